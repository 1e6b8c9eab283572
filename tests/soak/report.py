"""What an experiment says: figures beside what they are compared with, and promises that were kept or broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Report:
    """Of one experiment; ``broken`` is what a test asserts to be empty, ``output`` where curves go, if anywhere."""

    experiment: str
    output: Path | None = None
    broken: list[str] = field(default_factory=list)

    def figure(self, name: str, value: str, beside: str = "") -> None:
        """Say a figure, and the baseline or the limit it is read against."""
        print(f"{self.experiment:12}       {name}: {value}" + (f"   ({beside})" if beside else ""), flush=True)

    def promise(self, sentence: str, kept: bool, found: object = "") -> None:
        """Say whether a promise was kept; ``found`` is what was seen instead."""
        print(f"{self.experiment:12} {'kept ' if kept else 'BROKEN'} {sentence}", flush=True)
        if not kept:
            print(f"{self.experiment:12}        found: {str(found)[:2000]}", flush=True)
            self.broken.append(f"{sentence}: {str(found)[:500]}")

    def skipped(self, sentence: str, reason: str) -> None:
        """Say what could not be tried here."""
        print(f"{self.experiment:12} not tried: {sentence} ({reason})", flush=True)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]
