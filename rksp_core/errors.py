"""Every error that rksp raises on purpose. Each message is one sentence: what, got, expected, next step.

    RkspError                       exit code 2: usage, configuration or internal error
    |-- ConfigError                 a setting, flag or file says something impossible
    |-- DeviceError                 the device that was asked for is not here
    |-- MemoryLimitError            the work does not fit; says what to lower
    |-- ModelError                  MODEL cannot be found, imported, built or run
    |   `-- NoBlocksError           no residual blocks were found; lists the candidates
    |-- ProbeError                  the probe does not fit the model (vocabulary, shape, format)
    |-- ProfileError                a profile file cannot be read, or two profiles cannot be compared
    |-- ControlError                the control folder cannot be written or read
    |-- CheckpointError             a checkpoint cannot be used
    |   |-- IncompleteCheckpoint    it is still being written: try again
    |   |-- ExpiredCheckpoint       it vanished while it was read: a retention policy removed it
    |   |-- CorruptCheckpoint       it is complete, and wrong
    |   `-- UnsupportedCheckpoint   it is complete, and of a kind that is not read; skipped, and said once
    `-- NotFiniteError              exit code 3: activations are not finite; names the first bad layer

Numerical trouble inside a profile (a rank-deficient layer, say) is no error: it is a status in the result.
"""

from __future__ import annotations

from typing import ClassVar


class RkspError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user, as it is."""

    exit_code: ClassVar[int] = 2


class ConfigError(RkspError):
    """A setting, flag or file says something impossible."""


class DeviceError(RkspError):
    """The device that was asked for is not available."""


class MemoryLimitError(RkspError):
    """The work does not fit into memory; the message says what to lower."""


class ModelError(RkspError):
    """The model cannot be found, imported, built or run on the probe."""


class NoBlocksError(ModelError):
    """No residual blocks were found in the model; the message lists the candidates."""


class ProbeError(RkspError):
    """The probe batch cannot be read, or does not fit the model."""


class ProfileError(RkspError):
    """A profile cannot be read, or two profiles must not be compared."""


class ControlError(RkspError):
    """The control folder cannot be read or written."""


class CheckpointError(RkspError):
    """A checkpoint cannot be used."""


class IncompleteCheckpoint(CheckpointError):  # noqa: N818 - a state of the checkpoint, and so it is named
    """The checkpoint is still being written; try again later."""


class ExpiredCheckpoint(CheckpointError):  # noqa: N818
    """The checkpoint vanished while it was read."""


class CorruptCheckpoint(CheckpointError):  # noqa: N818
    """The checkpoint is complete, and its content is wrong."""


class UnsupportedCheckpoint(CheckpointError):  # noqa: N818
    """The checkpoint is recognised, and of a kind that is not read, or only with a setting that is off."""


class NotFiniteError(RkspError):
    """Activations are not finite; the message names the first bad layer."""

    exit_code: ClassVar[int] = 3
