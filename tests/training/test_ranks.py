"""Several real processes compute what one would: gradients, orders, checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rksp_core.orders import Levers
from training.loop import train
from training.ranks import Ranks
from training.run import Rollback, build_run
from training.step import advance

from .each_gradient import gradients

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
HERE = Path(__file__).parent
KSS = {"alpha": 0.5, "interval": 1, "layer_fraction": 1.0, "rank": 8}


def torchrun(processes: int, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, **options)


def ran(process: subprocess.Popen) -> bool:
    return process.wait(timeout=180) == 0


@pytest.fixture
def written(configure, tmp_path):
    """Return a function: sections -> (configuration, path of its YAML)."""

    def write(output="run", **sections):
        config = configure(output, **sections)
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return config, path

    return write


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_gradient_is_that_of_one_process_on_the_whole_batch(written, tmp_path, processes):
    """In float64, KSS on every block from 50 of the 64 tokens of each of two micro-batches."""
    config, path = written(precision="float64", kss=KSS | {"samples": 50}, accumulation=2)
    plain = config.model_copy(update={"kss": config.kss.model_copy(update={"alpha": 0.0})})
    alone, without = (gradients(build_run(each, Ranks(0, 1, torch.device("cpu")))) for each in (config, plain))
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    assert max(float((alone[name] - without[name]).abs().max()) for name in alone) > 0.1 * largest
    assert ran(torchrun(processes, HERE / "each_gradient.py", path, tmp_path))
    for strategy in ("ddp", "fsdp"):
        together = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
        for name, gradient in alone.items():
            # Some are rounding alone, such as that of a key's bias, which no softmax sees: hence the absolute part.
            torch.testing.assert_close(together[name], gradient, rtol=1e-10, atol=1e-13 * largest)


WAYS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp-dcp": {"parallel": "fsdp", "checkpoint": {"every": 4, "format": "dcp"}},
    # the last step has a checkpoint of its own, which is still being written when the run ends
    "fsdp-dcp-async": {"parallel": "fsdp", "checkpoint": {"every": 5, "format": "dcp", "asynchronous": True}},
}


@pytest.mark.slow
def test_two_processes_resume_exactly(written, tmp_path):
    common = {"kss": KSS | {"interval": 3}, "steps": 10, "profile": {"every": 5, "samples": 64}}
    runs = {
        name: [written(f"{name}-{part}", **common, **sections)[0] for part in ("whole", "parts")]
        for name, sections in WAYS.items()
    }
    alone, _ = written("begun-alone", **common, parallel="fsdp")
    train(alone, Ranks(0, 1, torch.device("cpu")), until=6)
    assert ran(torchrun(2, HERE / "each_resume.py", tmp_path))
    for name, (whole, parts) in runs.items():
        assert json.loads((Path(parts.output) / "result.json").read_text())["status"] == "finished"
        assert len(list((Path(parts.output) / "profiles").iterdir())) == 3
        assert figures(whole) == figures(parts), name
        assert weights(whole, 10) == weights(parts, 10), name
    assert figures(runs["fsdp"][0]) == figures(runs["fsdp-dcp"][0]) == figures(runs["fsdp-dcp-async"][0])
    for figure in ("loss", "gradient_norm"):
        ddp, *others = ([record[figure] for record in figures(run)] for run in (runs["ddp"][0], runs["fsdp"][0], alone))
        for other in others:
            assert ddp == pytest.approx(other, rel=1e-3)  # float32, summed in another order


@pytest.mark.slow
def test_two_processes_go_back_together(written, tmp_path):
    """From step 6 to the checkpoint of step 4, with half the rate, and two batches further on in the data."""
    common = {"steps": 8, "checkpoint": {"every": 2}}
    runs = {
        name: written(name, **common | sections | {"checkpoint": sections.get("checkpoint", {}) | {"every": 2}})[0]
        for name, sections in WAYS.items()
    }
    plain = build_run(written("plain", **common)[0], Ranks(0, 1, torch.device("cpu")))
    (tmp_path / "plain.yaml").unlink()
    records = [advance(plain) for _ in range(4)]
    plain.follower.levers = Levers(learning_rate_scale=0.5)
    plain.rollbacks = [Rollback(6, 4, diverged=False, data_offset=2)]
    records += [advance(plain) for _ in range(4)]
    assert ran(torchrun(2, HERE / "each_rollback.py", tmp_path))
    for config in runs.values():
        result = json.loads((Path(config.output) / "result.json").read_text())
        assert result["rollbacks"] == [{"left": 6, "reached": 4, "diverged": False, "data_offset": 2}]
        assert [line["loss"] for line in figures(config)] == pytest.approx([r.loss for r in records], rel=1e-3)
        assert [line["learning_rate"] for line in figures(config)] == [record.learning_rate for record in records]


@pytest.mark.slow
def test_what_rank_0_refuses_no_other_repeats(written):
    config, path = written()
    Path(config.output).mkdir()
    (Path(config.output) / "config.yaml").touch()
    process = torchrun(2, "-m", "training", path, stderr=subprocess.PIPE, text=True)
    errors = process.communicate(timeout=180)[1]
    assert process.returncode != 0
    assert errors.count("already holds a run; pass --resume") == 1
    assert "[rank" not in errors  # how a process's traceback begins


def figures(config) -> list[dict]:
    """What each step was, without what a clock has measured."""
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    clock = ("step_seconds", "tokens_per_second")
    return [{name: value for name, value in json.loads(line).items() if name not in clock} for line in lines]


def weights(config, step: int) -> list[bytes]:
    """The bytes of the weights in a checkpoint, whatever its format."""
    folder = Path(config.output) / "checkpoints" / f"step-{step:08d}"
    return [path.read_bytes() for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.distcp")))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_an_order_between_micro_batches_is_obeyed_by_all_at_the_next_step(written, tmp_path, processes):
    config, path = written(steps=12, accumulation=4, task={"batch": 16, "pairs": 2})
    assert ran(torchrun(processes, HERE / "each_rank.py", path, tmp_path))
    notes = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    assert all(note == notes[0] for note in notes)  # the same settings at each step, and the same weights at the end
    assert notes[0]["weights"] == [0.0] * 8 + [0.25] * 4
    assert notes[0]["rates"][7:] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-4, 1e-4], rel=1e-12)
    assert (notes[0]["clip"], notes[0]["surprise"], notes[0]["variant"]) == (0.5, 0.5, "hinge")
    answer = json.loads((config.control_folder / "applied.json").read_text())
    assert (answer["schema"], answer["status"], answer["step"]) == ("rksp.control.ack/3", "applied", 8)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them_cleanly(written):
    config, path = written(steps=1_000_000, checkpoint={"every": 1_000_000})
    process = torchrun(2, "-m", "training", path)
    log = Path(config.output) / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGUSR1)
    assert ran(process)
    result = json.loads((Path(config.output) / "result.json").read_text())
    assert result["status"] == "stopped"
    assert (Path(config.output) / "checkpoints" / f"step-{result['step']:08d}").is_dir()
