"""What reading a model's weights moves from the disk, and what it costs in memory, when most of the file is optimizer.

    python benchmarks/checkpoint_bytes.py [--megabytes 500] [--folder FOLDER]

Writes a model of so many megabytes with three times as much of other state, as one ``.pt`` file and as a folder of
torch.distributed.checkpoint, and the model alone as safetensors; drops them from the page cache, and loads the model
in a fresh process. Bytes are those that the kernel fetched from the disk for that process (``read_bytes`` of
``/proc/self/io``; a folder in memory shows none), beyond what the same process reads without a checkpoint. Memory is
the rise of its largest resident size over the model that was built before. The baseline is the whole checkpoint with
torch's own readers. The files are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

LAYERS = 50
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=int, default=500, help="of the model; the checkpoint has four times as much"
    )
    parser.add_argument("--folder", help="where to write, on a disk (default: the current one)", default=".")
    parser.add_argument("--read", nargs=2, metavar=("HOW", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    width = int((arguments.megabytes * MIB / 4 / LAYERS) ** 0.5)
    if arguments.read:
        print(json.dumps(read(*arguments.read, width)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for path, readers in written(Path(folder), width).items():
            size = sum(file.stat().st_size for file in files(path))
            print(f"{path.name}: {size / MIB:.0f} MiB, of which the model {LAYERS * width**2 * 4 / MIB:.0f}")
            base, _ = measured("nothing", path, arguments.megabytes)
            for how in ("rksp", *readers):
                moved, memory = measured(how, path, arguments.megabytes)
                moved -= base
                print(f"  {how:22} {moved / MIB:6.0f} MiB read ({moved / size:.2f}), {memory / MIB:+.0f} MiB resident")


def model(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def written(folder: Path, width: int) -> dict[Path, tuple[str, ...]]:
    """Write the checkpoints; return the baselines of each."""
    weights = model(width).state_dict()
    moments = {name: {key: torch.rand_like(value) for key in "abc"} for name, value in weights.items()}
    torch.save({"optimizer": moments, "model": weights}, folder / "step-1.pt")
    save_file(weights, folder / "step-1.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "step-1")
    return {
        folder / "step-1.pt": ("torch.load", "torch.load, mapped"),
        folder / "step-1.safetensors": ("safetensors",),
        folder / "step-1": ("dcp, everything",),
    }


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]


def measured(how: str, path: Path, megabytes: int) -> tuple[int, int]:
    """Drop the files from the page cache and read them in a fresh process; return bytes read and memory risen."""
    for file in files(path):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--megabytes", str(megabytes), "--read", how, str(path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["bytes"], found["memory"]


def read(how: str, text: str, width: int) -> dict[str, int]:
    """Load the model from a checkpoint, and say what that took."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.format_utils import _load_state_dict

    from rksp_monitor.checkpoints import read_weights
    from rksp_monitor.weights import load_into

    module, path = model(width), Path(text)
    for value in module.parameters():
        value.data.zero_()  # resident before, so that the rise is what reading takes
    before, resident = fetched(), largest()
    if how == "rksp":
        load_into(module, read_weights(path), path.name)
    elif how == "safetensors":
        module.load_state_dict(load_file(path))
    elif how.startswith("torch.load"):
        module.load_state_dict(torch.load(path, weights_only=True, mmap="mapped" in how)["model"])
    elif how.startswith("dcp"):
        content: dict = {}
        reader = dcp.FileSystemReader(path)
        _load_state_dict(content, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        module.load_state_dict(content["model"])
    memory = largest() - resident
    return {"bytes": fetched() - before, "memory": memory}


def largest() -> int:
    """Return the largest resident size so far, in bytes (that of `getrusage` counts the parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":") for line in lines)["VmHWM"].split()[0])


def fetched() -> int:
    """Return the bytes that the kernel fetched from disks for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


if __name__ == "__main__":
    main()
