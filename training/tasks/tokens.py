"""A text of any size as one row of token ids: tokenized once, kept in a file, and memory-mapped from there.

The file's name is a hash of what the tokens depend on: each file's name, size and time of change, the separator and the
tokenizer. It appears complete or not at all, and of several processes that want it, one writes it and the others wait.
Files of texts that have changed since stay until somebody removes them.
Tokenizing holds a few megabytes at a time: a text is cut into pieces where a word ends and a space follows. Tokenizers
of GPT's kind split there anyway; one that marks where a text begins (SentencePiece's kind) may give another token.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
from filelock import FileLock

from rksp_core.errors import ConfigError
from training.tasks.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

FOLDER = ".rksp-tokens"
FORMAT = 1
PIECE, LONGEST = 1 << 16, 1 << 18  # characters: read at once, and where a piece ends that holds no space
AT_ONCE = 32  # pieces


def read_tokens(text: Path, suffix: str, separator: str, tokenizer: Tokenizer, cache: Path | None) -> np.ndarray:
    """Return all tokens of a text, (n,) uint8, uint16 or uint32, memory-mapped and read-only.

    Parameters
    ----------
    text
        A file, or a folder: all files below it whose names end in ``suffix``, in the order of their paths.
    separator
        Text that stands between two files.
    cache
        The folder of the token file; None: ``.rksp-tokens`` beside the file, or in the folder.

    Raises
    ------
    ConfigError
        When there is no text, it is not UTF-8, or the tokens cannot be written.
    """
    files = _files(text, suffix)
    folder = cache or (text if text.is_dir() else text.parent) / FOLDER
    kind = np.min_scalar_type(tokenizer.ids - 1)
    target = folder / f"{_key(files, separator, tokenizer)}.{kind}"
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock")):
                if not target.exists():
                    _log.info("tokenizing %s; the tokens are kept in %s", text, folder)
                    _write(target, _encoded(_pieces(files, separator), tokenizer), kind)
        return np.asarray(np.memmap(target, dtype=kind, mode="r"))
    except OSError as error:
        raise ConfigError(
            f"cannot keep the tokens of {text} in {folder} ({error.strerror or error}); set task.cache to a folder"
        ) from error


def _files(text: Path, suffix: str) -> list[Path]:
    if text.is_dir():
        below = (path for path in text.rglob(f"*{suffix}") if FOLDER not in path.parts)
        files = sorted(path for path in below if path.is_file())
        if not files:
            raise ConfigError(f"task.path: no file below {text} ends in {suffix!r}; set task.suffix")
    elif text.exists():
        files = [text]
    else:
        raise ConfigError(f"task.path: {text} does not exist; give a file of text, or a folder of them")
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"task.path: {text} holds no text, its files are empty")
    return files


def _key(files: Iterable[Path], separator: str, tokenizer: Tokenizer) -> str:
    parts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([FORMAT, parts, separator, tokenizer.fingerprint]).encode()).hexdigest()[:32]


def _write(target: Path, rows: Iterable[np.ndarray], kind: np.dtype) -> None:
    temporary = target.with_suffix(".tmp")  # of the process that holds the lock
    try:
        with temporary.open("wb") as stream:
            for row in rows:
                stream.write(row.astype(kind).tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _encoded(pieces: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    while some := list(islice(pieces, AT_ONCE)):
        yield from tokenizer.encode(some)


def _pieces(files: Iterable[Path], separator: str) -> Iterator[str]:
    return chain.from_iterable(
        chain([separator] if number and separator else [], _pieces_of(file)) for number, file in enumerate(files)
    )


def _pieces_of(file: Path) -> Iterator[str]:
    rest = ""
    try:
        with file.open(encoding="utf-8", newline="") as stream:  # newline="": the characters as they are
            while block := stream.read(PIECE):
                rest += block
                cut = _word_end(rest) or (len(rest) if len(rest) >= LONGEST else 0)
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror})") from error
    if rest:
        yield rest


def _word_end(text: str) -> int:
    """Return the last place that holds a space and follows none, or 0."""
    place = len(text)
    while (place := text.rfind(" ", 0, place)) > 0:
        if not text[place - 1].isspace():
            return place
    return 0
