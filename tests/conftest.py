"""Shapes in signatures are checked in tests, and what needs a GPU is skipped where there is none."""

import pytest
from jaxtyping import install_import_hook

SHAPED = ("batch", "capture", "dmd", "kss", "moments", "spectrum")

# The hook must be in place before anything imports rksp_core.
install_import_hook([f"rksp_core.{name}" for name in SHAPED], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
