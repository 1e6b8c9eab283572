"""Checks that the constructors share; each mistake is one sentence that names the key of the YAML file."""

from __future__ import annotations

import math

from rksp_core.errors import ConfigError


def check_counts(**counts: object) -> None:
    """Require whole numbers of at least 1.

    Raises
    ------
    ConfigError
        About the first that is none.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"model.arguments.{name} must be a whole number of at least 1, got {value!r}")


def check_number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> None:
    """Require a finite number above one bound, or of at least another.

    Raises
    ------
    ConfigError
        When it is none.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if above is not None and not above < number < math.inf:
        raise ConfigError(f"model.arguments.{name} must be a number above {above}, got {value!r}")
    if least is not None and not least <= number < math.inf:
        raise ConfigError(f"model.arguments.{name} must be a number of at least {least}, got {value!r}")
