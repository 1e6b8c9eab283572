"""Shapes in signatures are checked in tests: the hook must be in place before anything imports rksp_core."""

from jaxtyping import install_import_hook

SHAPED = ("batch", "capture", "dmd", "kss", "moments", "spectrum")

install_import_hook([f"rksp_core.{name}" for name in SHAPED], "beartype.beartype")
