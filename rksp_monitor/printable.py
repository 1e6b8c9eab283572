"""Words for a terminal: text of others (names of checkpoints, a trainer's answer) without its commands, and counts."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text with what is no printable character written as its code: no line breaks, no terminal commands."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 rule, 2 rules, 2 entries."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun.removesuffix('y')}ies" if noun.endswith("y") else f"{count} {noun}s"
