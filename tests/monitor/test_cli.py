"""The command line from outside: exit codes, streams, formats, and one sentence for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rksp_monitor.cli import run
from rksp_monitor.commands.config import template

TINY = "tests.monitor.factories:tiny"
FACTORIES = "tests.monitor.factories"


def rksp(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rksp_monitor", *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from rksp_monitor.cli import run; code = run(['preflight', '--help']); "
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules); "
        "print(heavy, file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_and_its_help() -> None:
    done = rksp("--help")
    assert done.returncode == 0
    assert "preflight" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["--bogus"], "No such option: --bogus"),
        (["preflight"], "Missing argument 'MODEL'"),
        (["preflight", TINY, "--fail-on", "never"], "'never' is not one of"),
        (["preflight", TINY, "--samples", "few"], "--samples"),
        (["preflight", TINY, "--seed", "99999999999999999999"], "--seed"),
        (["preflight", TINY, "--arg", "width"], "--arg takes key=value, got 'width'"),
        (["preflight", TINY, "--arg", "width=["], "the value of --arg width is no YAML"),
        (["preflight", TINY, "--lr", "0"], "the learning rate must be positive"),
        (["preflight", TINY, "--lr", "1", "--standard-lr", "0"], "--standard-lr must be above 0, got 0"),
        (["preflight", TINY, "--depth", "12"], "--depth is of no use without --lr"),
        (["preflight", TINY, "--standard-lr", "1e-3"], "--standard-lr is of no use without --lr"),
        (["preflight", TINY, "--device", "tpu"], "device must be auto, cpu, cuda or cuda:n, got 'tpu'"),
        (["preflight", TINY, "--dtype", "int8"], "dtype must be one of"),
        (["preflight", TINY, "--lr", "1", "--loss", "nowhere:loss"], "no module 'nowhere'"),
        (["preflight", TINY, "--blocks", "h.*"], "no module is called h.*"),
        (["preflight", TINY, "--probe", "nowhere.npy"], "nowhere.npy cannot be read: No such file"),
        (["preflight", "nowhere:make"], "no module 'nowhere'"),
        (["preflight", f"{FACTORIES}:raises"], "raised ValueError: width 16 is odd today"),
        (["preflight", f"{FACTORIES}:hidden"], "give a --probe"),
        (["preflight", f"{FACTORIES}:exhausting"], "out of memory on cpu; lower --micro-batch"),
        (["preflight", "no such:model"], "no module 'no such'"),
        (["probe", "make", "p.safetensors"], "give one source of the probe"),
        (["probe", "make", "p.safetensors", "--text", "t.txt"], "--text and --tokenizer belong together"),
        (
            ["probe", "make", "p.safetensors", "--vocabulary", "9", "--sequences", "99999999", "--length", "999999"],
            "out of memory on cpu; lower --sequences or --length",
        ),
        (["probe", "make", "p.npy", "--vocabulary", "3"], "a probe file ends in .safetensors, got p.npy"),
        (["watch", "nowhere", "--port-file", "nowhere/port"], "there is no folder"),
        (["probe", "show", "nowhere.safetensors"], "nowhere.safetensors cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.startswith("rksp: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_no_cuda_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["preflight", TINY, "--device", "cuda:1"]) == 2
    assert "use --device cpu or auto" in capsys.readouterr().err


def test_not_finite_is_exit_3_and_names_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["preflight", f"{FACTORIES}:not_finite"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "blocks.1" in err


@pytest.mark.parametrize(("flags", "code"), [(["--exit-zero"], 0), (["--on-inconclusive", "pass"], 0)])
def test_not_finite_obeys_the_flags_of_an_inconclusive_verdict(flags: list[str], code: int) -> None:
    assert run(["preflight", f"{FACTORIES}:not_finite", *flags]) == code


def test_a_version() -> None:
    assert run(["--version"]) == 0


class TestExitCodes:
    """By the verdict, and by what the caller makes of it."""

    @pytest.mark.parametrize(
        ("argv", "code"),
        [
            ([f"{FACTORIES}:no_norm"], 1),  # use_kss
            ([f"{FACTORIES}:no_norm", "--fail-on", "monitor"], 1),
            ([f"{FACTORIES}:no_norm", "--exit-zero"], 0),
            ([f"{FACTORIES}:zero_branches"], 3),
            ([f"{FACTORIES}:zero_branches", "--on-inconclusive", "pass"], 0),
            ([f"{FACTORIES}:zero_branches", "--on-inconclusive", "fail"], 1),
            ([f"{FACTORIES}:zero_branches", "--exit-zero"], 0),
        ],
    )
    def test_code(self, argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["preflight", *argv]) == code
        assert capsys.readouterr().err == ""

    def test_a_low_risk_passes_and_a_middle_one_can_fail(self) -> None:
        from rksp_monitor.commands.preflight import exit_code

        codes = {
            verdict: [exit_code(verdict, on, "report", exit_zero=False) for on in ("monitor", "use_kss")]
            for verdict in ("proceed", "monitor", "use_kss", "inconclusive")
        }
        assert codes == {"proceed": [0, 0], "monitor": [1, 0], "use_kss": [1, 1], "inconclusive": [3, 3]}


class TestOutput:
    """Only the result is on stdout."""

    def test_json_on_stdout_is_one_document(self, capsys: pytest.CaptureFixture[str]) -> None:
        run(["preflight", TINY, "--arg", "depth=2", "--lr", "1e-3", "--format", "json"])
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert document["schema"] == "rksp.preflight/1"
        assert len(document["layers"]) == 2
        assert err == ""

    def test_no_colours_where_there_is_no_terminal(self) -> None:
        done = rksp("preflight", TINY)
        assert "\x1b" not in done.stdout + done.stderr
        assert "blocks.0" in done.stdout

    def test_a_terminal_gets_colours_unless_no_color_is_set(self) -> None:
        for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            assert ("\x1b[1" in _on_a_terminal("preflight", TINY, **environment)) is coloured

    @pytest.mark.parametrize("form", ["table", "json", "markdown", "html"])
    def test_a_file_instead(self, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "report"
        run(["preflight", TINY, "--format", form, "--output-file", str(path)])
        out, err = capsys.readouterr()
        assert out == ""
        assert str(path) in err
        assert "blocks.0" in path.read_text()
        assert [file.name for file in tmp_path.iterdir()] == ["report"]

    def test_a_pipe_is_written_to_and_stays(self, tmp_path: Path) -> None:
        # Replacing it in one step, as a file is, would take /dev/null from the whole machine when root does it.
        path = tmp_path / "report"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        assert run(["config", "init", str(path), "--force"]) == 0
        assert os.read(reader, 65536).decode() == template()
        os.close(reader)
        assert path.is_fifo()

    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "report")
        run(["preflight", TINY, "--output-file", str(tmp_path / "link")])
        assert (tmp_path / "link").is_symlink()
        assert "blocks.0" in (tmp_path / "report").read_text()

    @pytest.mark.parametrize("place", ["nowhere/report", ".", "/proc/report"])
    def test_an_unwritable_file_is_refused_before_the_work(
        self, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # The model does not exist: if it were looked for first, the sentence would be another one.
        assert run(["preflight", "nowhere:make", "--output-file", str(tmp_path / place)]) == 2
        assert "output file" in capsys.readouterr().err


class TestStreams:
    """Nothing that happens to a stream looks like "high risk"."""

    def shell(self, redirection: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = " ".join([sys.executable, "-m", "rksp_monitor", *argv, redirection])
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=120,
        )

    @pytest.mark.parametrize("argv", [("preflight", TINY, "--exit-zero"), ("config", "schema")])
    def test_a_reader_that_left_is_exit_2(self, argv: tuple[str, ...]) -> None:
        done = self.shell("| sleep 0", *argv)
        assert (done.returncode, done.stderr) == (2, "")

    def test_no_stdout_at_all(self) -> None:
        done = self.shell(">&-", "preflight", TINY, "--exit-zero")
        assert (done.returncode, done.stderr) == (0, "")

    def test_no_stderr_at_all(self, tmp_path: Path) -> None:
        done = self.shell("2>&-", "watch", str(tmp_path), "--once")
        assert (done.returncode, done.stdout) == (3, "")

    def test_a_full_disk_behind_stdout(self) -> None:
        done = self.shell("> /dev/full", "preflight", TINY)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "No space left" in done.stderr

    def test_an_encoding_without_the_letters(self) -> None:
        done = self.shell("", "preflight", TINY, "--exit-zero", PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")


class TestProbe:
    """`rksp probe make`, `show`, and preflight with the result."""

    def test_made_shown_used(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = str(tmp_path / "p.safetensors")
        assert run(["probe", "make", path, "--vocabulary", "32", "--sequences", "40", "--seed", "5"]) == 0
        assert run(["probe", "show", path, "--format", "json"]) == 0
        made, shown = capsys.readouterr().out.split("{", 1)
        about = json.loads("{" + shown)
        assert about["sha256"] in made
        assert about["tensors"] == {"input_ids": {"dtype": "int64", "shape": [40, 64]}}
        run(["preflight", TINY, "--probe", path, "--format", "json"])
        assert json.loads(capsys.readouterr().out)["probe"]["sha256"] == about["sha256"]

    def test_a_raw_batch_serves_directly_and_as_a_source(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raw, path = str(tmp_path / "b.npy"), str(tmp_path / "p.safetensors")
        np.save(raw, np.arange(2048).reshape(32, 64) % 32)
        run(["probe", "make", path, "--batch", raw])
        hashes = [capsys.readouterr().out.split()[1]]
        for probe in (raw, path):
            run(["preflight", TINY, "--probe", probe, "--format", "json"])
            hashes.append(json.loads(capsys.readouterr().out)["probe"]["sha256"])
        assert len(set(hashes)) == 1

    def test_another_vocabulary_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = str(tmp_path / "p.safetensors")
        run(["probe", "make", path, "--vocabulary", "1000"])
        assert run(["preflight", TINY, "--probe", path]) == 2
        assert f"{TINY} takes 0 to 31" in capsys.readouterr().err


def _on_a_terminal(*argv: str, **environment: str) -> str:
    """Run the command on a pseudo-terminal and return what it wrote there."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rksp_monitor", *argv]
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL, env={**plain, "TERM": "xterm-256color", **environment}
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # Linux reports the end of a pseudo-terminal so
        pass
    finally:
        os.close(ours)
        process.wait(timeout=60)
    return b"".join(parts).decode()
