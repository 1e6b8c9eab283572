"""Every mistake in a configuration is one sentence that names the key, and exit code 2, before any training."""

import resource
from pathlib import Path

import pytest
import yaml

from rksp_core.errors import ConfigError
from tests.training.real_data import need_data
from training.__main__ import main
from training.build import build_model
from training.config import Model, parse_config, read_config

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
GOOD = yaml.safe_load((CONFIGS / "recall_small.yaml").read_text())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_shipped_configuration_is_valid(path, capsys):
    need_data(read_config(path).task)
    assert main([str(path), "--check"]) == 0
    assert "the configuration is valid" in capsys.readouterr().out


def test_a_model_without_blocks_is_one_sentence():
    with pytest.raises(ConfigError, match=r"torch.nn:Linear returned a Linear without a stack of residual blocks"):
        build_model(Model(factory="torch.nn:Linear", arguments={"in_features": 2, "out_features": 2}), 0)


def test_check_writes_nothing(tmp_path):
    assert main([str(CONFIGS / "recall_small.yaml"), "--check", "--set", f"output={tmp_path / 'run'}"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepps=3", "unknown key 'stepps'; did you mean 'steps'?"),
        ("optimizer.learning_rte=3", "unknown key 'optimizer.learning_rte'; did you mean 'optimizer.learning_rate'?"),
        ("zzz=3", "unknown key 'zzz'; known are run_id, output"),
        (
            "optimizer.name=adam",
            "optimizer.name must be one of adamw, lamb, lion, sgd, got 'adam'; did you mean 'adamw'?",
        ),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate cannot be -1: it should be greater than 0"),
        ("steps=many", "steps cannot be 'many': it should be a valid integer"),
        ("steps.more=3", "'steps' is a single value and has no key 'more'"),
        ("steps", "--set takes key=value"),
        ("kss.variant=papier", "kss.variant cannot be 'papier': it should be 'paper' or 'hinge'"),
        ("task.pairs=40", "task.pairs = 40 needs sequences of at least 81 tokens, got length 64"),
        ("task.vocabulary=999", "task.vocabulary = 999 is more than the model's 256"),
        ("model.arguments.heads=3", "model.arguments.heads must divide width, got 3 heads for width 64"),
        ("model.arguments.widht=3", "unknown key 'model.arguments.widht'; did you mean 'model.arguments.width'?"),
        ("model.factory=training.models.gpt:Gpt", "training.models.gpt has no 'Gpt'; did you mean 'GPT'?"),
        ("model.factory=nowhere:GPT", "cannot import 'nowhere'"),
        ("model.factory=.gpt:GPT", "model.factory cannot be '.gpt:GPT'"),
        ("model.factory=builtins:dict", "model.factory: builtins:dict has no arguments by name"),
        ("task={name: images, data: digits}", "GPT raised RuntimeError on the first inputs of the task images"),
        ("device=tpu", "device must be auto, cpu, cuda or cuda:n, got 'tpu'"),
        ("threads=0", "threads cannot be 0: it should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(change, message, capsys):
    assert main([str(CONFIGS / "recall_small.yaml"), "--check", "--set", change]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("model: [", "is not valid YAML at line"),
        ("steps: 20\nsteps: 30\n", "is not valid YAML at line 1: steps is given twice"),
        ("- a list", "must hold a mapping of settings, got list"),
        (b"\xff\xfe\x00", "cannot read"),
        (
            "{model: {factory: 'a:b'}, task: {vocabulary: 8, length: 8}, kss: 0.1}",
            r"kss must be a section with keys of its own, such as \{alpha: ...\}, got 0.1",
        ),
        ("steps: 3", "the key 'model' is missing"),
        (
            "{model: {factory: 'a:b'}, task: {}}",
            "the key 'task.vocabulary' is missing; give it, or name it among model.arguments",
        ),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(CONFIGS / "recall_small.yaml"), "--set", f"output={tmp_path / 'file' / 'run'}"]) == 2
    assert "cannot write to the run folder" in capsys.readouterr().err


def test_a_disk_that_is_full_is_one_sentence(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file may be larger, the log of the steps included
    changes = [f"output={tmp_path / 'run'}", "profile.sequences=1", "checkpoint.every=0", "task.batch=2"]
    try:
        assert main([str(CONFIGS / "recall_small.yaml"), *(part for each in changes for part in ("--set", each))]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 1000
    assert capsys.readouterr().err.endswith("(File too large); free some space or change output\n")


def test_a_control_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    changes = [f"output={tmp_path / 'run'}", f"control.folder={tmp_path / 'file' / 'control'}"]
    arguments = [part for change in changes for part in ("--set", change)]
    assert main([str(CONFIGS / "recall_small.yaml"), *arguments]) == 2
    assert "cannot make the control folder" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()  # which would say that there is a run


def test_a_step_to_stop_at_is_not_negative(capsys):
    assert main([str(CONFIGS / "recall_small.yaml"), "--until", "-3"]) == 2
    assert "--until takes a step of at least 0, got -3" in capsys.readouterr().err


def test_changes_and_defaults(tmp_path):
    path = tmp_path / "my_run.yaml"
    path.write_text(yaml.safe_dump({key: GOOD[key] for key in ("model", "task")}))
    config = read_config(path, ["optimizer.betas=[0.9, 0.95]", "stabilizers.clip=1.0", "control.folder=/somewhere"])
    assert (config.run_id, config.output) == ("my_run", "runs/my_run")
    assert (config.optimizer.betas, config.stabilizers.clip, config.control_folder) == (
        (0.9, 0.95),
        1.0,
        Path("/somewhere"),
    )
    assert (config.task.vocabulary, config.task.length) == (256, 64)


def test_a_resolved_configuration_reads_back_as_itself():
    config = read_config(CONFIGS / "recall_small.yaml")
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), "again") == config
