"""A Hugging Face folder or configuration -> a torch module: offline, no remote code, no pickles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rksp_core.errors import ModelError

if TYPE_CHECKING:
    from rksp_monitor.models import LoadedModel

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_huggingface(path: Path, arguments: Mapping[str, Any], seed: int) -> LoadedModel:
    """Build the model of a configuration, with the folder's weights when they are there.

    Parameters
    ----------
    path
        A folder with ``config.json`` (weights are read from its ``*.safetensors``, otherwise they are initialized at
        random), or a ``config.json`` itself (always initialized at random: the way to look at a pretrained
        architecture before training).
    arguments
        Fields of the configuration to replace.
    seed
        Seeds a random initialization.

    Raises
    ------
    ModelError
        When transformers is missing, the folder holds no usable configuration or weights, or the weights are pickles.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{path} is a Hugging Face model and transformers is not installed; pip install 'rksp[hf]'"
        ) from error
    from rksp_monitor.models import LoadedModel, seeded, user_code

    config = _read_config(path, arguments)
    pretrained = path.is_dir() and any(path.glob("*.safetensors"))
    if path.is_dir() and not pretrained:
        _refuse_pickles(path)
    auto: Any = transformers.AutoModelForCausalLM if _is_causal(config) else transformers.AutoModel
    with _quiet(), user_code(f"building {path}"):
        if pretrained:
            module, missing = _read_weights(auto, path, config)
        else:
            with seeded(seed):
                module, missing = auto.from_config(config, trust_remote_code=False).float(), ()
    return LoadedModel(
        module=module.eval(),
        source=str(path),
        kind="huggingface",
        weights="pretrained" if pretrained else "random",
        vocabulary=_whole(config, "vocab_size"),
        max_length=_whole(config, "max_position_embeddings"),
        warnings=missing,
    )


def _read_config(path: Path, arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    from rksp_monitor.models import user_code

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file} does not exist; a Hugging Face model is a folder with a config.json, or that file")
    with _quiet(), user_code(f"reading {file}"):
        config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    unknown = [name for name in arguments if not hasattr(config, name)]
    if unknown:
        raise ModelError(f"the configuration {file} ({config.model_type}) has no field {unknown[0]!r} to set")
    for name, value in arguments.items():
        setattr(config, name, value)
    config.use_cache = False  # one forward pass needs no key-value cache
    return config


def _is_causal(config: Any) -> bool:
    """Whether the language-model head belongs on it: as the configuration says, or by its model type."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if config.architectures:
        return any(name.endswith(_CAUSAL) for name in config.architectures)
    # BERT and its kin can be built as decoders too; a bare configuration of one means the encoder.
    return (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _read_weights(auto: Any, path: Path, config: Any) -> tuple[Any, tuple[str, ...]]:
    import torch

    module, info = auto.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if not missing:
        return module, ()
    sentence = f"{len(missing)} tensors are not in the weights of {path} and hold random values (first: {missing[0]})"
    return module, (sentence,)


def _refuse_pickles(path: Path) -> None:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ModelError(
            f"{path} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read; "
            "save the model again as safetensors, or give its config.json for a random initialization"
        )


def _whole(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' notes and progress bars off the terminal; what matters becomes a warning of the report."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
