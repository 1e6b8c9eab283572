"""From text to token ids: the bytes themselves, or a tokenizer that someone gave."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rksp_core.errors import ConfigError

BYTES = "bytes"


class Tokenizer(Protocol):
    """``ids``: one more than the largest id. Tokenizers with equal fingerprints give equal ids."""

    ids: int
    fingerprint: str

    def encode(self, pieces: Sequence[str]) -> Sequence[np.ndarray]:
        """Return the token ids of each piece of text, without any special tokens around them."""
        ...


class Bytes:
    """The 256 bytes of UTF-8."""

    ids = 256
    fingerprint = BYTES

    def encode(self, pieces: Sequence[str]) -> Sequence[np.ndarray]:
        """Return the bytes of each piece."""
        return [np.frombuffer(piece.encode(), dtype=np.uint8) for piece in pieces]


class Given:
    """A ``tokenizer.json`` as the `tokenizers` library reads it (extra ``hf``).

    Raises
    ------
    ConfigError
        When it cannot be read, or the library is missing.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"task.tokenizer: cannot read {file} ({error.strerror}); give {BYTES!r}, a tokenizer.json or its folder"
            ) from error
        try:
            from tokenizers import Tokenizer as Fast

            self._tokenizer = Fast.from_buffer(content)
        except ImportError as error:
            raise ConfigError(f"reading the tokenizer {file} needs an extra; pip install 'rksp[hf]'") from error
        except Exception as error:  # the library raises bare exceptions
            raise ConfigError(f"task.tokenizer: {file} is no tokenizer that `tokenizers` can read ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.ids = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, pieces: Sequence[str]) -> Sequence[np.ndarray]:
        """Return the ids of each piece; the pieces are shared among the library's threads."""
        encodings = self._tokenizer.encode_batch_fast(list(pieces), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def read_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that ``task.tokenizer`` names.

    Raises
    ------
    ConfigError
        When there is no such tokenizer.
    """
    return Bytes() if name == BYTES else Given(Path(name))
