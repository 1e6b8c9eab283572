"""What goes wrong on purpose: at its step, for as long as it should, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rksp_core import find_blocks
from rksp_core.errors import ConfigError
from training.experiments.faults import Fault, Faulty, fault_of
from training.experiments.one_run import carry_out
from training.experiments.plan import plan
from training.experiments.spec import Spec
from training.loop import drive
from training.ranks import Ranks
from training.run import Run, build_run
from training.step import Record
from training.tasks import PROBE, TRAINING

from .conftest import Configure


class Seen:
    """Keeps the records of the steps, and the weights after each."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.weights: list[list[torch.Tensor]] = []

    def after(self, run: Run, record: Record | None) -> None:
        self.records += [] if record is None else [record]
        self.weights.append([parameter.detach().clone() for parameter in run.model.parameters()])

    def end(self, _: Run) -> None: ...


def driven(configure: Configure, fault: Fault | None, **sections: Any) -> tuple[Run, Seen]:
    run, seen = build_run(configure(steps=8, **sections), Ranks(0, 1, torch.device("cpu"))), Seen()
    drive(run, [seen] if fault is None else [seen, Faulty(run, fault)])
    return run, seen


FAULTS = [
    Fault(kind="random_tokens", at=4, steps=2),
    Fault(kind="constant_tokens", at=4, steps=2),
    Fault(kind="learning_rate", at=4, steps=2, strength=30.0),
    Fault(kind="second_moments", at=4, strength=1e-4),
    Fault(kind="momentum", at=4, strength=-50.0),
    Fault(kind="weights", at=4, strength=2.0),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_the_run_is_the_healthy_one_up_to_the_fault_and_another_after_it(configure: Configure, fault: Fault) -> None:
    healthy, faulty = (driven(configure, each)[1].weights for each in (None, fault))
    same = [
        all(map(torch.equal, before, after)) for before, after in zip(healthy, faulty, strict=True)
    ]  # of steps 0 to 8
    assert same == [True] * 4 + [False] * 5


def test_the_rate_is_higher_for_so_many_steps(configure: Configure) -> None:
    fault = Fault(kind="learning_rate", at=4, steps=2, strength=30.0)
    healthy, faulty = (driven(configure, each)[1].records for each in (None, fault))
    factors = [other.learning_rate / one.learning_rate for one, other in zip(healthy, faulty, strict=True)]
    assert factors == pytest.approx([1, 1, 1, 30, 30, 1, 1, 1])


@pytest.mark.parametrize("kind", ["random_tokens", "constant_tokens"])
def test_a_bad_batch_is_a_function_of_seed_and_step(configure: Configure, kind: str) -> None:
    run, other = (build_run(configure(steps=8), Ranks(0, 1, torch.device("cpu"))) for _ in range(2))
    good = run.task.batch(TRAINING, 4, 8)
    Faulty(run, Fault(kind=kind, at=4)), Faulty(other, Fault(kind=kind, at=4))
    bad, again = (each.task.batch(TRAINING, 4, 8) for each in (run, other))
    assert torch.equal(bad.inputs, again.inputs)
    assert bad.inputs.shape == good.inputs.shape
    assert not torch.equal(bad.inputs, good.inputs)
    assert (bad.inputs.unique().numel() == 1) == (kind == "constant_tokens")
    healthy = build_run(configure(steps=8), Ranks(0, 1, torch.device("cpu"))).task
    for stream, step in ((TRAINING, 3), (TRAINING, 5), (PROBE, 4)):
        assert torch.equal(run.task.batch(stream, step, 8).inputs, healthy.batch(stream, step, 8).inputs)


def test_only_the_middle_block_is_scaled(configure: Configure) -> None:
    run = build_run(configure(steps=8), Ranks(0, 1, torch.device("cpu")))
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    Faulty(run, Fault(kind="weights", at=1, strength=2.0)).after(run, None)
    middle = find_blocks(run.model)[1].name
    for name, parameter in run.model.named_parameters():
        factor = 2.0 if name.startswith(f"{middle}.") and parameter.dim() >= 2 else 1.0
        assert torch.equal(parameter, before[name] * factor), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fault.kind": "weights", "fault.at": 3}, "fault.strength is for all kinds but"),
        ({"fault.kind": "random_tokens", "fault.at": 3, "fault.strength": 2.0}, "fault.strength is for all kinds but"),
        ({"fault.kind": "weights", "fault.at": 3, "fault.strength": 2.0, "fault.steps": 3}, "happens once"),
        ({"fault.kind": "weights", "fault.strength": 2.0}, "the key 'at' is missing"),
        ({"fault.kind": "weights", "fault.ta": 2}, "did you mean 'at'"),
    ],
)
def test_a_mistake_is_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fault_of(settings)


def test_an_optimizer_without_the_state_is_refused(configure: Configure) -> None:
    run = build_run(configure(optimizer={"name": "sgd"}), Ranks(0, 1, torch.device("cpu")))
    with pytest.raises(ConfigError, match="sgd has no second moments"):
        Faulty(run, Fault(kind="second_moments", at=2, strength=0.1))


def test_a_sweep_knows_its_faults() -> None:
    """A fault tells two configurations apart, stands in the record, and strikes."""
    arguments = {"vocabulary": 32, "length": 16, "width": 16, "depth": 2, "heads": 2, "norm": "pre_ln"}
    spec = Spec.model_validate(
        {
            "name": "faults",
            "base": {
                "steps": 10,
                "model": {"factory": "training.models.gpt:GPT", "arguments": arguments},
                "task": {"batch": 8, "pairs": 2},
            },
            "groups": [
                {"name": "healthy"},
                {
                    "name": "burst",
                    "settings": {"fault.kind": "weights", "fault.at": 5},
                    "grid": {"fault.strength": [1e6, 1e9]},
                },
            ],
            "measure": {"profile": {"every": 5, "samples": 64, "sequences": 4}, "look_ahead": []},
        }
    )
    runs = {(run.group, run.settings.get("fault.strength")): run for run in plan(spec)}
    assert len({run.key for run in runs.values()}) == 3
    record = carry_out(spec, runs["burst", 1e9], "cpu")
    assert record["configuration"]["fault.strength"] == 1e9
    assert record["labels"]["rksp"] == 5
    healthy = carry_out(spec, runs["healthy", None], "cpu")
    assert healthy["labels"]["rksp"] is None
    assert not [key for key in healthy["configuration"] if key.startswith("fault")]
