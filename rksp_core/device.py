"""The one place that decides where tensors live."""

from __future__ import annotations

import torch

from rksp_core.errors import ConfigError, DeviceError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:n``.

    Raises
    ------
    DeviceError
        When the name is unknown or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:n, got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(f"device {name} is not here ({count} CUDA devices found); use --device cpu or auto")
    elif device.type != "cpu":
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:n, got {name!r}")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """Return the floating dtype called ``name`` (float32, bfloat16, float16, float64, or fp32, bf16, fp16, fp64).

    Raises
    ------
    ConfigError
        When the name is unknown.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
