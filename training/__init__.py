"""The bundled reference trainer: an ordinary client of `rksp_core`, run from a checkout as ``python -m training``."""
