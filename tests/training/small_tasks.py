"""A small section of each task. Run by `test_tasks`: prints a hash of each one's batches, for the folder given."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from training.build import build_task
from training.schema import task as schema
from training.tasks import EVALUATION, PROBE, TRAINING

NAMES = ("associative_recall", "synthetic_lm", "text", "images", "augmented")
TEXT = Path(__file__).parents[2] / "LICENSE"  # a real text that is always there


def section(name: str, folder: Path):
    """Return the section; what it reads is in the repository, or written into ``folder``."""
    if name == "associative_recall":
        return schema.AssociativeRecall(vocabulary=64, length=16)
    if name == "synthetic_lm":
        return schema.SyntheticLM(vocabulary=64, length=16, training_sequences=50, validation_sequences=20)
    if name == "text":
        return schema.Text(path=str(TEXT), cache=str(folder), vocabulary=256, length=16)
    if name == "images":
        return schema.Images(data="digits", path=str(_digits(folder)))
    return schema.Images(data="digits", path=str(_digits(folder)), augment=True, image=12)


def hashes(folder: Path, steps: list[int]) -> dict[str, str]:
    """Return a hash of each task's batches at these steps."""
    found = {}
    for name in NAMES:
        task, digest = build_task(section(name, folder), seed=42), hashlib.sha256()
        for stream in (TRAINING, PROBE, EVALUATION):
            for step in steps:
                for part in task.batch(stream, step, 8):
                    digest.update(part.numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def _digits(folder: Path) -> Path:
    path = folder / "digits.csv"
    if not path.exists():
        random = np.random.default_rng(0)
        rows = np.column_stack([random.integers(0, 17, (60, 64)), random.integers(0, 10, 60)])
        np.savetxt(path, rows, fmt="%d", delimiter=",")
    return path


if __name__ == "__main__":
    print(json.dumps(hashes(Path(sys.argv[1]), json.loads(sys.argv[2]))))
