"""Text and a tokenizer folder -> the token ids of a probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rksp_core.errors import ProbeError
from rksp_monitor.probe import LENGTH, SEQUENCES, TOKENS, Probe

if TYPE_CHECKING:
    from torch import Tensor

Encode = Callable[[str], list[int]]

_CHARACTERS = 32  # a token is rarely longer; so much text is encoded for each token wanted


def text_probe(
    text: Path, tokenizer: Path, *, sequences: int = SEQUENCES, length: int = LENGTH, lines: bool = False
) -> Probe:
    """Return ``sequences`` x ``length`` tokens of a text, without special tokens.

    Sequences start at evenly spaced places of the text and are full, so there is no padding. With ``lines``, each
    non-empty line is a prompt: cut at ``length``, padded with 0, and masked by ``attention_mask``. A short text gives
    fewer sequences.

    Raises
    ------
    ProbeError
        When a file cannot be read, or the text does not fill one sequence.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"{text} cannot be read as UTF-8 text: {error}") from error
    encode = read_tokenizer(tokenizer)
    origin = f"{'lines of ' if lines else ''}{text.name} with the tokenizer {tokenizer.name}"
    metadata = {"text": str(text), "tokenizer": str(tokenizer), "lines": lines}
    rows = _prompts(content, encode, sequences, length) if lines else _pieces(content, encode, sequences, length)
    if not rows:
        wanted = "a non-empty line" if lines else f"{length} tokens"
        raise ProbeError(f"{text} does not hold {wanted}; give a longer text or a smaller --length")
    return Probe(_batch(rows), origin, metadata)


def read_tokenizer(folder: Path) -> Encode:
    """Return text -> token ids, from ``tokenizer.json`` or whatever else transformers can read there, offline.

    Raises
    ------
    ProbeError
        When the folder holds no tokenizer, or the extra that reads it is missing.
    """
    fast = folder / "tokenizer.json"
    try:
        if fast.is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(fast))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise ProbeError(f"{folder} is no folder; give the folder of a tokenizer")
        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ProbeError(f"reading the tokenizer {folder} needs an extra; pip install 'rksp[hf]'") from error
    except ProbeError:
        raise
    except Exception as error:  # both libraries raise bare exceptions
        first = str(error).strip().partition("\n")[0]
        raise ProbeError(f"{folder} holds no readable tokenizer ({type(error).__name__}: {first})") from error
    return lambda text: list(auto.encode(text, add_special_tokens=False))


def _pieces(text: str, encode: Encode, sequences: int, length: int) -> list[list[int]]:
    stride = max(len(text) // sequences, 1)
    rows = [encode(text[start : start + min(stride, _CHARACTERS * length)]) for start in range(0, len(text), stride)]
    full = [row[:length] for row in rows if len(row) >= length][:sequences]
    if len(full) == sequences:
        return full
    tokens = encode(text)
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)][:sequences]


def _prompts(text: str, encode: Encode, sequences: int, length: int) -> list[list[int]]:
    return [row for line in text.splitlines() if (row := encode(line.strip())[:length])][:sequences]


def _batch(rows: list[list[int]]) -> dict[str, Tensor]:
    import torch

    longest = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    if all(len(row) == longest for row in rows):
        return {TOKENS: tokens}
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {TOKENS: tokens, "attention_mask": mask}
