"""Settings from flags, variables and YAML; the commented file that is written holds every default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rksp_core.errors import ConfigError
from rksp_core.policy import Rung
from rksp_monitor.cli import run
from rksp_monitor.config import Every, RunSettings, WatchSettings, read_settings
from rksp_monitor.run import describe_run


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "watch.yaml"
    path.write_text(text)
    return path


def test_the_written_file_states_every_setting_at_its_default(tmp_path: Path):
    import yaml

    path = tmp_path / "watch.yaml"
    assert run(["config", "init", str(path)]) == 0
    assert read_settings(path) == read_settings()
    document = yaml.safe_load(path.read_text())
    assert set(document) == set(WatchSettings.model_fields)
    for section in ("replay", "control", "workers"):
        assert set(document[section]) == set(type(getattr(read_settings(), section)).model_fields)
    assert "ADVISORY" in path.read_text()


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, "seed: 1\n")
    assert run(["config", "init", str(path)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert run(["config", "init", str(path), "--force"]) == 0


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, "poll_interval: 1\nseed: 1\ndevice: cpu\nreplay: {timeout: 1, attempts: 7}\n")
    monkeypatch.setenv("RKSP_POLL_INTERVAL", "2")
    monkeypatch.setenv("RKSP_SEED", "2")
    monkeypatch.setenv("RKSP_REPLAY__TIMEOUT", "2")
    settings = read_settings(path, {"poll_interval": 3.0, "device": None})
    assert (settings.poll_interval, settings.seed, settings.device) == (3.0, 2, "cpu")
    assert (settings.replay.timeout, settings.replay.attempts) == (2.0, 7)


def test_the_file_can_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RKSP_CONFIG", str(written(tmp_path, "seed: 9")))
    assert read_settings().seed == 9


def test_a_policy_is_read_as_the_core_means_it(tmp_path: Path):
    text = """
policy:
  raise_after: 2
  ladder: {1: {alpha: 0.05}}
  rules:
    - {name: r, level: 1, all: [{metric: log_kreiss_mean, against: baseline, direction: rises, by: 2}]}
"""
    policy = read_settings(written(tmp_path, text)).policy
    assert policy.ladder == {1: Rung(alpha=0.05)}
    assert policy.rules[0].all[0].against == "baseline"
    assert policy.clear_after == 3


def test_an_entry_of_runs_takes_what_it_leaves_out_from_the_top_level(tmp_path: Path):
    text = """
seed: 3
replay: {samples: 64, timeout: 9}
policy: {raise_after: 2}
runs:
  - {folder: a, replay: {timeout: 5}, backlog: {every: 500}}
  - {folder: b, policy: {clear_after: 9}, enforce: true}
"""
    settings = read_settings(written(tmp_path, text), {"enforce": False}, ["c"])
    a, b, c = settings.runs
    assert (a.folder, a.seed, a.replay.samples, a.replay.timeout, a.backlog) == ("a", 3, 64, 5, Every(every=500))
    assert (b.policy.raise_after, b.policy.clear_after) == (2, 9)
    assert b.enforce is False, "a flag wins over every entry"
    assert (c.folder, c.replay.timeout, c.backlog) == ("c", 9, "all")


def test_one_name_for_several_runs_is_refused():
    with pytest.raises(ConfigError, match="cannot name several runs"):
        read_settings(None, {"run_id": "x"}, ["a", "b"])


MISTAKES = {
    "polcy: {}": "unknown key 'polcy'; did you mean 'policy'",
    "replay: {timout: 3}": "unknown key 'replay.timout'; did you mean 'replay.timeout'",
    "policy: {rules: [{name: a, levle: 1}]}": "unknown key 'policy.rules.0.levle'; did you mean 'policy.rules.0.level'",
    "policy: {ladder: {2: {alfa: 1}}}": "unknown key 'policy.ladder.2.alfa'; did you mean 'policy.ladder.2.alpha'",
    "policy: {ladder: {2: {clip: 0}}}": "clip must be a number above 0 or left out, got 0",
    "policy: {ladder: {2: {surprise: -1}}}": "surprise must be a number above 0 or left out, got -1",
    "policy: {ladder: {2: {variant: hinges}}}": "got 'hinges'",
    "policy: {rules: [{name: a, level: 1, all: [{metric: loss, by: .nan}]}]}": "by must be a finite number, got nan",
    "policy: {expires_in: .inf}": "expires_in must be above 0 seconds and at most 1e+09, or null, got inf",
    "policy: {ladder: {2: {alpha: -1}}}": "kss.alpha must be a number of at least 0, got -1",
    "policy: {rules: [{name: a, level: 1, all: [{metric: kreiss, by: 1}]}]}": "unknown metric 'kreiss'",
    "policy: {rules: [{name: a, level: 1, all: [{metric: loss, by: 1, against: past}]}]}": "got 'past'",
    "poll_interval: 0": "poll_interval: input should be greater than 0, got 0",
    "fail_on: low": "fail_on: ",
    "device: tpu": "device: string should match pattern '^(auto|cpu|cuda",
    "listen: nowhere": "an address is host:port",
    "control: {mode: rw}": "control.mode: ",
    "runs: [{folder: a, backlogg: all}]": "unknown key 'runs.0.backlogg'; did you mean 'runs.0.backlog'",
    "runs: [{folder: a, backlog: {every: 0}}]": "runs.0.backlog.every: input should be greater than or equal to 1",
    "backlog: {}": "backlog.every: field required",
    "runs: [{folder: a, listen: 1}]": "runs.0.listen: listen belongs to the top level, as all runs share it",
    "runs: [a]": "an entry of runs is {folder: ...}",
    "runs: a": "runs must be a list",
    "runs: [{run_id: a}]": "runs.0.folder",
    "webhooks: [{url: 'ftp://x'}]": "webhooks.0.url: a webhook's url is https://HOST/PATH; see",
    "webhooks: [{url: 'https://secret.example', events: [risk_levl]}]": "'stopped'; did you mean 'risk_level'? See",
    "fail_on: hihg": "'critical', got 'hihg'; did you mean 'high'? See `rksp config schema`",
    "backlog: lates": "backlog: input should be 'all' or 'latest', got 'lates'; did you mean 'latest'?",
    "policy: {ladder: {hihg: {alpha: 1}}}": "policy.ladder.hihg: input should be a valid integer",
    "policy: {rules: [{name: a, level: eleveted}]}": "got 'eleveted'; did you mean 1 (elevated)?",
    "workers: {nicenes: 1}": "did you mean 'workers.niceness'",
    "[1, 2]": "must hold a mapping of settings",
    "a: [": "is no YAML in line",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, text)
    assert run(["config", "validate", str(path)]) == 2
    said = capsys.readouterr().err
    assert MISTAKES[text] in said
    assert said.count("\n") == 1
    assert str(path) in said
    assert "secret" not in said


def test_a_trainers_configuration_that_may_not_be_read_is_no_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read \(Permission denied\)"):
        describe_run(tmp_path, RunSettings())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RKSP_REPLAY_TIMEOUT", "did you mean RKSP_REPLAY__TIMEOUT?"),
        ("RKSP_CONTROL_MODE", "did you mean RKSP_CONTROL__MODE?"),
        ("RKSP_REPLAY", "RKSP_REPLAY__KEY"),
    ],
)
def test_a_variable_of_a_section_is_refused_with_the_right_form(name: str, says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "fast")
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_settings()


def test_a_value_that_a_variable_gave_is_the_variables_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, "replay: {timeout: 3}\nruns: [{folder: a}]")
    monkeypatch.setenv("RKSP_REPLAY__TIMEOUT", "abc")
    with pytest.raises(ConfigError, match=r"^the variable RKSP_REPLAY__TIMEOUT: replay.timeout: .*, got 'abc'"):
        read_settings(path)
    monkeypatch.setenv("RKSP_REPLAY__TIMEOUT", "5")
    monkeypatch.setenv("RKSP_SEED", "7")
    with pytest.raises(ConfigError, match=r"watch\.yaml: replay.samples: .*got 0"):
        read_settings(written(tmp_path, "replay: {samples: 0}"))
    with pytest.raises(ConfigError, match=r"^the settings: seed: "):
        read_settings(flags={"seed": -1})


def test_a_misspelt_variable_is_refused_and_a_stranger_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RKSP_IMAGE_TAG", "v1")
    monkeypatch.setenv("RKSP_RUN", "of the event that a hook is told")
    read_settings()
    monkeypatch.setenv("RKSP_POLL_INTERVL", "3")
    with pytest.raises(ConfigError, match="RKSP_POLL_INTERVL names no setting; did you mean RKSP_POLL_INTERVAL"):
        read_settings()


def test_the_schema_is_json_and_describes_every_setting(capsys: pytest.CaptureFixture[str]):
    assert run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(WatchSettings.model_fields)


def test_a_valid_file_says_how_many_runs_it_watches(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    text = f"runs: [{{folder: /data/one, enforce: true}}, {{folder: '{tmp_path}/runs/*'}}]"
    assert run(["config", "validate", str(written(tmp_path, text))]) == 0
    said = capsys.readouterr().out
    assert "12 rules; some runs enforce, some observe; 3 run folders by 2 entries of `runs`\n" in said
    assert "are looked at by `rksp doctor --config" in said
    assert run(["config", "validate", str(written(tmp_path, "enforce: true\npolicy: {rules: []}"))]) == 0
    assert "0 rules; enforces; names no runs" in capsys.readouterr().out
    assert run(["config", "validate", str(written(tmp_path, "runs: [{folder: /data/one}]"))]) == 0
    assert "observes; 1 run folder by 1 entry of `runs`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["config", "check"], "No such command 'check', only init, validate, schema; see `rksp config --help`"),
        (["config", "valdate"], "Did you mean 'validate'?"),
        (["control", "hodl"], "Did you mean 'hold'?"),
    ],
)
def test_an_unknown_command_names_those_there_are(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert run(argv) == 2
    assert says in capsys.readouterr().err


def test_what_yaml_itself_stumbles_over_is_one_sentence(tmp_path: Path):
    for text in ("seed: 2024-13-45", "[" * 3000):
        with pytest.raises(ConfigError, match="is no YAML"):
            read_settings(written(tmp_path, text))
