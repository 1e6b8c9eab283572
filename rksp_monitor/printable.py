"""Text of others (names of checkpoints, a trainer's answer, a reason) as it can stand on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text with what is no printable character written as its code: no line breaks, no terminal commands."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
