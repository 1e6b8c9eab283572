"""The numerics of Residual Koopman Spectral Profiling and Shaping (Kim et al. 2026), for any trainer.

Names are imported when they are first used: ``from rksp_core import ControlListener`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rksp_core.capture import find_blocks
    from rksp_core.control import ControlListener, ControlWriter
    from rksp_core.follower import ControlFollower
    from rksp_core.kreiss import KreissResult, kreiss_constant, transient_growth
    from rksp_core.kss import KSSRegularizer, kss_loss
    from rksp_core.limits import Limits
    from rksp_core.moments import Moments
    from rksp_core.noise import profile_noise
    from rksp_core.orders import Desired, KSSSettings
    from rksp_core.profile import LayerProfile, ModelProfile
    from rksp_core.profile_writer import ProfileWriter
    from rksp_core.profiling import profile_model

_HOME = {
    "ControlFollower": "follower",
    "ControlListener": "control",
    "ControlWriter": "control",
    "Desired": "orders",
    "KSSRegularizer": "kss",
    "KSSSettings": "orders",
    "KreissResult": "kreiss",
    "LayerProfile": "profile",
    "Limits": "limits",
    "ModelProfile": "profile",
    "Moments": "moments",
    "ProfileWriter": "profile_writer",
    "find_blocks": "capture",
    "kreiss_constant": "kreiss",
    "kss_loss": "kss",
    "profile_model": "profiling",
    "profile_noise": "noise",
    "transient_growth": "kreiss",
}

__all__ = [
    "ControlFollower",
    "ControlListener",
    "ControlWriter",
    "Desired",
    "KSSRegularizer",
    "KSSSettings",
    "KreissResult",
    "LayerProfile",
    "Limits",
    "ModelProfile",
    "Moments",
    "ProfileWriter",
    "find_blocks",
    "kreiss_constant",
    "kss_loss",
    "profile_model",
    "profile_noise",
    "transient_growth",
]


def __getattr__(name: str) -> Any:
    """Import ``name`` from the module that holds it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'rksp_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rksp_core.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
