"""Profiles of pretrained models on fixed prompts (Kim et al. 2026, App. D.3), for Tables 10 and 15, Figures 3 and 4.

python -m training.experiments.paper.pretrained              # models/smollm2-135m, models/minilm-l6
python -m training.experiments.paper.pretrained FOLDER ...   # any Hugging Face folder: GPT-2 and LLaMA-2 as well

What it finds is kept below ``benchmarks/data/paper/pretrained``, one file a model, and the tables show every model that
is kept. The two folders are made by ``scripts/real_models.py``.

The prompts are consecutive pieces of 64 tokens of the file LICENSE, so that no sequence is padded. The paper has 32
prompts, of which 4 or 8 differ: a repeated column changes no least squares, so ``8`` is 8 prompts, of at most 512
different token states, and ``32`` is as many different ones. Each model is profiled once more with the weights that
its architecture starts from, which tells what was learned from what was there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rksp_core import ModelProfile, profile_model
from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.command import ANEW, carried_out
from training.experiments.paper.contents import DATA, ROOT
from training.experiments.paper.section import same
from training.experiments.record import compact

SCHEMA = "rksp.paper_pretrained/1"
STAND_INS = ("models/smollm2-135m", "models/minilm-l6")
TEXT = ROOT / "LICENSE"
PROMPTS = (8, 32)
LENGTH = 64  # tokens of a prompt, the paper's most
SAMPLES = 2048
SEED = 32000  # of the weights that an architecture starts from

# By (model_type, layers); the paper's models among all that the command may be given.
NAMES = {("gpt2", 12): "GPT-2 124M", ("gpt2", 24): "GPT-2 355M", ("llama", 32): "LLaMA-2-7B"}

LABELS = {
    "near_unit_mass": "near-unit mass",
    "spectral_radius": "rho",
    "eigenvector_condition": "kappa",
    "nonlinearity_ratio": "eta_nl",
}
HEADER = (
    "model and figure",
    "the paper's model",
    "ours, 8 prompts",
    "ours, 32 prompts",
    "random weights, 32 prompts",
    "rise or fall, same sign (8, 32)",
)
Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Pretrained:
    """A model's profiles, by how many different prompts there were.

    ``trained[prompts]`` and ``untrained[prompts]`` hold one list, in depth order, for each of `LABELS`, for ``rank``
    and for ``distinct_samples``.
    """

    name: str
    parameters: int
    width: int
    trained: dict[int, dict[str, list[Any]]]
    untrained: dict[int, dict[str, list[Any]]]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.trained[PROMPTS[0]]["rank"])


def main(argv: Sequence[str] | None = None) -> int:
    """Profile the folders, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments.paper.pretrained")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help=f"default: {', '.join(STAND_INS)}")
    arguments = parser.parse_args(argv)
    return carried_out("pretrained", lambda: _work(arguments), ANEW)


def _work(arguments: argparse.Namespace) -> None:
    for folder in arguments.folders or [ROOT / name for name in STAND_INS]:
        found = measure(folder)
        path = DATA / "pretrained" / f"{found.name.lower().replace(' ', '-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"schema": SCHEMA, **asdict(found)}, separators=(",", ":")) + "\n")
        print(f"{found.name}: {found.depth} layers, {found.parameters / 1e6:.0f}M parameters, kept as {path.name}")


def measure(folder: Path) -> Pretrained:
    """Profile a model as it was trained, and as its architecture starts.

    Raises
    ------
    ConfigError
        When the folder holds no model with weights in safetensors and a tokenizer, or the text is too short for it.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no config.json; make the stand-ins with scripts/real_models.py models")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="auto")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{folder} cannot be loaded ({reason}); give a folder with safetensors and a tokenizer"
        ) from error
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < max(PROMPTS) * LENGTH:
        raise ConfigError(f"{TEXT} has {len(ids)} tokens for {folder}, expected at least {max(PROMPTS) * LENGTH}")
    trained = _profiles(model, ids)
    parameters = sum(each.numel() for each in model.parameters())
    dtype = next(model.parameters()).dtype
    del model  # one of 7B is enough in memory
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        untrained = _profiles(AutoModel.from_config(config, dtype=dtype), ids)
    depth = len(trained[PROMPTS[0]]["rank"])
    name = NAMES.get((config.model_type, depth), folder.resolve().name)
    return Pretrained(name, parameters, config.hidden_size, trained, untrained)


def kept() -> list[Pretrained]:
    """Return all models that were profiled, the largest first.

    Raises
    ------
    ConfigError
        When there is none, or a file holds something else.
    """
    found = []
    for path in sorted((DATA / "pretrained").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("schema", None) != SCHEMA:
            raise ConfigError(f"{path} does not hold {SCHEMA!r}; profile the model again")
        for when in ("trained", "untrained"):
            document[when] = {int(prompts): columns for prompts, columns in document[when].items()}
        found.append(Pretrained(**document))
    if not found:
        raise ConfigError("no pretrained model is kept; run: python -m training.experiments.paper.pretrained")
    return sorted(found, key=lambda model: -model.parameters)


def averages(values: list[float | None]) -> list[float]:
    """Return the means over the layers of the first, the middle and the last third of the depth."""
    return [average(list(part)) for part in np.array_split(np.array(values, dtype=float), 3)]


def average(values: list[float | None]) -> float:
    """Return the mean over the layers that have a value."""
    return float(np.nanmean(np.array(values, dtype=float)))


def rises(values: list[float | None]) -> bool:
    """Return whether the last third lies above the first."""
    first, _, last = averages(values)
    return last > first


def setting(models: Sequence[Pretrained]) -> str:
    """Return what was profiled, and how."""
    named = ", ".join(f"{model.name} ({model.depth} layers, width {model.width})" for model in models)
    return (
        f"{named}: pieces of {LENGTH} tokens of the file LICENSE, 8 of them (as many different ones as the paper has) "
        f"or 32; up to {SAMPLES} token states; one profile each, and one of the same architecture with random "
        "weights. Three figures are the means over the layers of the first, middle and last third, and their sign is "
        "whether they rise. Another model is added by `python -m training.experiments.paper.pretrained FOLDER`."
    )


def rows(models: Sequence[Pretrained], published: Mapping[str, tuple[float, float, float]]) -> Rows:
    """Return a row for each field and model; ``published`` are the thirds of the model that they stand in for."""
    return tuple(_row(model, field, thirds) for model in models for field, thirds in published.items())


def _row(model: Pretrained, field: str, published: tuple[float, float, float]) -> tuple[str, ...]:
    digits = 0 if field == "eigenvector_condition" else 2
    shown = [
        " / ".join(f"{value:.{digits}f}" for value in averages(when[prompts][field]))
        for when, prompts in ((model.trained, 8), (model.trained, 32), (model.untrained, 32))
    ]
    up = published[2] > published[0]
    signs = ", ".join(same(rises(model.trained[prompts][field]) == up) for prompts in PROMPTS)
    return f"{model.name}, {LABELS[field]}", " / ".join(map(str, published)), *shown, signs


def _profiles(model: nn.Module, ids: list[int]) -> dict[int, dict[str, list[Any]]]:
    model.eval()
    return {
        prompts: _columns(profile_model(model, _prompts(ids, prompts), samples=SAMPLES, micro_batch=8))
        for prompts in PROMPTS
    }


def _prompts(ids: list[int], count: int) -> Tensor:
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def _columns(profile: ModelProfile) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {field: [compact(value) for value in profile.values(field)] for field in LABELS}
    for name in ("rank", "distinct_samples"):
        columns[name] = [getattr(layer, name) for layer in profile.layers]
    return columns


if __name__ == "__main__":
    sys.exit(main())
