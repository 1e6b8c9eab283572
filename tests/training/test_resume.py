"""An interrupted run that is resumed is bitwise the run that was never interrupted, and observers change no bit."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rksp_core.control import ControlWriter
from rksp_core.errors import CheckpointError, ConfigError
from rksp_core.orders import KSSSettings, Reason
from training.checkpoint import checkpoints
from training.loop import train
from training.ranks import Ranks
from training.run import build_run
from training.tasks.evaluation import evaluate

ALONE = Ranks(0, 1, torch.device("cpu"))
KSS = {"alpha": 0.15, "interval": 3, "layer_fraction": 0.5}


def final(config) -> tuple[dict, dict, dict, list[dict]]:
    """Weights, optimizer, state and metrics of a run's last checkpoint, without what a clock has written."""
    folder = Path(config.output)
    run = build_run(config, ALONE)
    run.restore(checkpoints(folder / "checkpoints")[-1])
    state = run.state()
    state["control"] = state["control"]["order"] and state["control"]["order"]["kss"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {k: v for k, v in record.items() if k not in ("step_seconds", "tokens_per_second")} for record in records
    ]
    return run.model.state_dict(), run.optimizer.state_dict(), state, timeless


def assert_bitwise_equal(left, right) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_bitwise_equal(value, right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_bitwise_equal(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("norm", ["pre_ln", "no_norm"])
@pytest.mark.parametrize("kss", [{}, KSS], ids=["plain", "kss"])
def test_twenty_steps_are_ten_steps_and_ten_more(configure, norm, kss):
    sections = {
        "arguments": {"norm": norm},
        "kss": kss,
        "stabilizers": {"clip": 1.0},
        "profile": {"every": 5, "samples": 64},
    }
    whole, parts = configure("whole", **sections), configure("parts", **sections)
    assert train(whole, ALONE)["status"] == "finished"
    assert train(parts, ALONE, until=10)["status"] == "stopped"
    assert train(parts, ALONE, resume=True)["status"] == "finished"
    assert_bitwise_equal(final(whole), final(parts))
    terms = [record["kss_term"] for record in final(whole)[3]]
    assert [term > 0 for term in terms] == [bool(kss) and step % 3 == 0 for step in range(20)]


FORMATS = [{"format": "safetensors"}, {"format": "pt"}, {"format": "dcp"}, {"format": "dcp", "asynchronous": True}]


@pytest.mark.parametrize("form", FORMATS, ids=["safetensors", "pt", "dcp", "dcp-async"])
def test_each_format_resumes_exactly(configure, form):
    sections = {"checkpoint": {"every": 4, "keep_last": 2, **form}, "kss": KSS}
    whole, parts = configure("whole", **sections), configure("parts", **sections)
    train(whole, ALONE)
    train(parts, ALONE, until=10)
    train(parts, ALONE, resume=True)
    assert_bitwise_equal(final(whole), final(parts))
    names = {path.name for path in (Path(parts.output) / "checkpoints").iterdir()}
    assert names == {"step-00000016", "step-00000020"}  # and nothing half written


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_no_format_changes_the_training(configure, optimizer):
    """To see an optimizer's state before the first step, DCP lets it make one, which those with a counter remember."""
    sections = {"optimizer": {"name": optimizer}, "schedule": {"warmup": 0}, "steps": 3}
    plain, dcp = (configure(form, checkpoint={"format": form}, **sections) for form in ("safetensors", "dcp"))
    train(plain, ALONE)
    train(dcp, ALONE, until=0)
    train(dcp, ALONE, resume=True)
    assert_bitwise_equal(final(plain)[3], final(dcp)[3])


@pytest.mark.parametrize("form", FORMATS, ids=["safetensors", "pt", "dcp", "dcp-async"])
def test_a_checkpoint_that_cannot_be_written_is_one_sentence(configure, form):
    config = configure(checkpoint={"every": 1, **form})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may be larger
    try:
        with pytest.raises(CheckpointError, match=r"^cannot write the checkpoint .*; free some space") as caught:
            train(config, ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert checkpoints(Path(config.output) / "checkpoints") == []


@pytest.mark.parametrize(
    "sections",
    [
        {"precision": "bfloat16"},
        {"activation_checkpointing": True, "kss": KSS},
        {"accumulation": 4, "kss": KSS},
        {"stabilizers": {"spectral_norm": {}}, "checkpoint": {"every": 10, "format": "dcp"}},
    ],
    ids=["bfloat16", "activation_checkpointing", "accumulation", "spectral_norm-dcp"],
)
def test_each_way_to_compute_resumes_exactly(configure, sections):
    whole, parts = configure("whole", **sections), configure("parts", **sections)
    train(whole, ALONE)
    train(parts, ALONE, until=7)
    train(parts, ALONE, resume=True)
    assert_bitwise_equal(final(whole), final(parts))


def test_activation_checkpointing_changes_no_bit(configure):
    """It computes twice what it would otherwise have stored; the KSS term and its measured ratio included."""
    stored, again = configure("stored", kss=KSS), configure("again", kss=KSS, activation_checkpointing=True)
    train(stored, ALONE)
    train(again, ALONE)
    assert_bitwise_equal(final(stored), final(again))


def test_micro_batches_are_the_batch(configure):
    """Without KSS, whose term is one of each micro-batch, the gradient is the same but for rounding."""
    one, four = (configure(f"in-{k}", accumulation=k, precision="float64") for k in (1, 4))
    train(one, ALONE)
    train(four, ALONE)
    for left, right in zip(final(one)[3], final(four)[3], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-10)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-10)


def test_a_crash_loses_the_steps_after_the_checkpoint_and_nothing_else(configure):
    whole, crashed = configure("whole"), configure("crashed")
    train(whole, ALONE)
    train(crashed, ALONE, until=10)
    with (Path(crashed.output) / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')  # two steps were made, the log was cut
    kept = Path(crashed.output) / "checkpoints"
    for left in (".step-00000012.tmp", ".step-00000005.removed"):  # one was begun, one was not yet gone
        (kept / left).mkdir()
    train(crashed, ALONE, resume=True)
    assert_bitwise_equal(final(whole), final(crashed))
    assert sorted(path.name for path in kept.iterdir()) == [f"step-000000{step}" for step in ("00", "10", "20")]


def test_a_model_that_draws_random_numbers_resumes_exactly(configure):
    model = {"factory": "tests.training.test_resume:dropping", "arguments": {}}
    task = {"batch": 8, "pairs": 2, "vocabulary": 32, "length": 16}
    whole, parts = (configure(name, model=model, task=task) for name in ("whole", "parts"))
    train(whole, ALONE)
    train(parts, ALONE, until=7)
    train(parts, ALONE, resume=True)
    assert_bitwise_equal(final(whole), final(parts))


def dropping() -> torch.nn.Module:
    """A model of a user's own, with dropout, which draws from torch's global random state."""
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    encoder = torch.nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    return torch.nn.Sequential(torch.nn.Embedding(32, 16), encoder, torch.nn.Linear(16, 32))


ARCHITECTURES = {
    "gpt:GPT": {"heads": 2},
    "moe:MoE": {"heads": 2, "experts": 4},
    "mamba:Mamba": {},
    "kan:KAN": {"heads": 2, "basis": 4},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_observing_changes_no_bit(configure, architecture):
    """Profiles, checkpoints and a control folder that is polled, against a run with none of them."""
    arguments = {"vocabulary": 32, "length": 16, "width": 16, "depth": 2} | ARCHITECTURES[architecture]
    model = {"factory": f"training.models.{architecture}", "arguments": arguments}
    plain = configure("plain", checkpoint={"every": 20}, model=model)
    observing = {"checkpoint": {"every": 3}, "profile": {"every": 2, "samples": 64, "sequences": 4}}
    observed = configure("observed", model=model, **observing)
    train(plain, ALONE)
    train(observed, ALONE)
    assert len(list((Path(observed.output) / "profiles").iterdir())) == 11
    assert_bitwise_equal(final(plain), final(observed))


def test_an_order_is_obeyed_again_after_a_resume(configure):
    ordered, resumed = configure("ordered"), configure("resumed")
    for config in (ordered, resumed):
        ControlWriter(config.control_folder).issue("small", KSSSettings(alpha=0.2, interval=2), Reason())
    train(ordered, ALONE)
    train(resumed, ALONE, until=9)
    train(resumed, ALONE, resume=True)
    assert_bitwise_equal(final(ordered), final(resumed))
    weights = [record["kss_weight"] for record in final(resumed)[3]]
    assert weights == [0.2] * 20


def test_a_run_can_be_prepared_and_begun_later(configure):
    whole, begun = (configure(name, profile={"every": 10, "samples": 64}) for name in ("whole", "begun"))
    train(whole, ALONE)
    assert train(begun, ALONE, until=0)["step"] == 0
    assert [path.name for path in (Path(begun.output) / "profiles").iterdir()] == ["step-00000000.json"]
    train(begun, ALONE, resume=True)
    assert_bitwise_equal(final(whole), final(begun))


def test_an_order_holds_over_a_resume_when_its_file_is_gone(configure):
    config = configure()
    levers = {"clip": 0.5, "learning_rate_scale": 0.5}
    ControlWriter(config.control_folder).issue("small", KSSSettings(alpha=0.2, variant="hinge"), Reason(), **levers)
    train(config, ALONE, until=10)
    (config.control_folder / "desired.json").unlink()
    train(config, ALONE, resume=True)
    records = final(config)[3]
    assert [record["kss_weight"] for record in records] == [0.2] * 20
    assert [record["learning_rate"] for record in records[5:]] == [5e-4] * 15
    assert records[-1]["control_generation"] == 1


def test_an_order_outside_the_limits_is_rejected_and_changes_nothing(configure):
    config = configure(control={"limits": {"learning_rate_scale": [0.5, 1.0]}})
    writer = ControlWriter(config.control_folder)
    writer.issue("small", KSSSettings(alpha=0.2), Reason(), learning_rate_scale=0.1)
    train(config, ALONE)
    assert [record["kss_weight"] for record in final(config)[3]] == [0.0] * 20
    answer = writer.applied()
    assert answer.status == "rejected"
    assert "learning_rate_scale 0.1, this trainer allows 0.5 to 1" in answer.message


def test_an_order_on_less_than_one_layer_is_rejected(configure):
    config = configure()  # two blocks
    writer = ControlWriter(config.control_folder)
    writer.issue("small", KSSSettings(alpha=0.2, layer_fraction=0.4), Reason())
    train(config, ALONE, until=2)
    assert writer.applied().status == "rejected"
    assert "kss.layer_fraction 0.4, this trainer allows 0.5 to 1" in writer.applied().message


def test_the_last_checkpoint_does_not_wait_for_the_evaluation(configure, monkeypatch):
    """Whoever sent SIGTERM may not wait either; and no more items at once than the micro-batches of training."""
    config, seen = configure(accumulation=4), []

    def at_once(task, forward, items, size):
        seen.append((size, [path.name for path in checkpoints(Path(config.output) / "checkpoints")]))
        return evaluate(task, forward, items, size)

    monkeypatch.setattr("training.loop.evaluate", at_once)
    train(config, ALONE, until=3)
    assert seen == [(2, ["step-00000000", "step-00000003"])]


def test_an_answer_that_cannot_be_written_does_not_stop_the_run(configure, caplog):
    config = configure()
    (config.control_folder / "applied.json").mkdir(parents=True)
    ControlWriter(config.control_folder).issue("small", KSSSettings(alpha=0.2), Reason())
    assert train(config, ALONE)["status"] == "finished"
    assert "the answer cannot be written" in caplog.text
    assert final(config)[3][0]["kss_weight"] == 0.2


def test_a_profile_that_fails_does_not_stop_the_run(configure):
    config = configure(profile={"every": 10, "samples": 1})  # one sample has no variance
    said = []
    assert train(config, ALONE, say=said.append)["status"] == "finished"
    assert said[0].startswith("no profile at step 0")


def test_a_folder_that_holds_a_run_is_not_overwritten(configure):
    train(configure(), ALONE, until=1)
    with pytest.raises(ConfigError, match="already holds a run; pass --resume"):
        train(configure(), ALONE)


def test_another_configuration_does_not_resume(configure):
    train(configure(), ALONE, until=1)
    with pytest.raises(ConfigError, match=r"was begun with optimizer.learning_rate = 0.001, got 0.01"):
        train(configure(optimizer={"learning_rate": 0.01}), ALONE, resume=True)


def test_a_run_may_be_made_longer_and_say_less(configure):
    """What changes no figure of a run may be another one: here its length, as the rate is constant."""
    whole, longer = configure("whole"), configure("longer", steps=10)
    train(whole, ALONE)
    train(longer, ALONE)
    more = configure("longer", print_every=5, checkpoint={"every": 4, "format": "pt"})
    assert train(more, ALONE, resume=True)["status"] == "finished"
    assert_bitwise_equal(final(whole), final(more))


def test_resume_where_there_is_nothing_starts_at_the_beginning(configure):
    assert train(configure(), ALONE, resume=True, until=3)["step"] == 3


@pytest.mark.parametrize(("form", "file"), [("pt", "training_state.pt"), ("dcp", ".metadata"), ("dcp", "*.distcp")])
def test_a_damaged_checkpoint_is_named(configure, form, file):
    config = configure(checkpoint={"format": form})
    train(config, ALONE, until=1)
    newest = checkpoints(Path(config.output) / "checkpoints")[-1]
    next(newest.glob(file)).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"^cannot resume from .*step-00000001 \(.*remove it") as caught:
        train(config, ALONE, resume=True)
    assert "\n" not in str(caught.value)


def test_only_the_newest_checkpoints_are_kept(configure):
    config = configure(checkpoint={"every": 2, "keep_last": 2})
    train(config, ALONE, until=7)
    names = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000007"]


def test_each_of_a_coarser_spacing_is_kept(configure):
    config = configure(checkpoint={"every": 2, "keep_last": 1, "keep_every": 6})
    train(config, ALONE)
    names = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (0, 6, 12, 18, 20)]


def test_a_checkpoint_says_what_it_is_and_needs_no_pickle(configure):
    config = configure()
    train(config, ALONE)
    folder = Path(config.output)
    newest = checkpoints(folder / "checkpoints")[-1]
    description = json.loads((newest / "checkpoint.json").read_text())
    assert description["step"] == 20
    assert description["metrics"] == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert description["config"] == config.model_dump(mode="json")
    assert "optimizer" in torch.load(newest / "training_state.pt", weights_only=True)
    assert load_file(newest / "model.safetensors")["blocks.0.mlp.up.weight"].shape == (64, 16)
    assert load_file(folder / "probe.safetensors")["input_ids"].shape == (8, 16)


def test_a_run_that_diverges_stops_and_says_when(configure):
    config = configure(optimizer={"learning_rate": 5.0}, arguments={"norm": "no_norm"}, steps=100)
    result = train(config, ALONE)
    assert result == json.loads((Path(config.output) / "result.json").read_text())
    assert result["status"] == "diverged"
    assert result["horizon"] == 100
    assert result["diverged_at"]["paper"] <= result["diverged_at"]["rksp"] == result["step"] + 1
