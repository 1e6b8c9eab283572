"""Probes: their content hash, their formats, and the models they fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rksp_core.errors import ProbeError
from rksp_monitor.models import load_model
from rksp_monitor.probe import Probe, check_probe, model_input, random_probe, read_probe, write_probe
from rksp_monitor.tokens import text_probe


def test_random_tokens_depend_on_their_arguments_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_probe(100)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert random_probe(100).sha256 == first.sha256
    assert random_probe(100, seed=1).sha256 != first.sha256
    tokens = first.batch["input_ids"]
    assert (tuple(tokens.shape), tokens.dtype) == ((32, 64), torch.int64)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 100


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = random_probe(100, 3, 5)
    write_probe(made, tmp_path / "p.safetensors")
    read = read_probe(tmp_path / "p.safetensors")
    assert (read.sha256, read.origin, read.metadata) == (made.sha256, made.origin, made.metadata)
    assert torch.equal(read.batch["input_ids"], made.batch["input_ids"])


def test_a_changed_probe_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_probe(random_probe(100, 3, 5), path)
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # one bit of the last token
    path.write_bytes(data)
    with pytest.raises(ProbeError, match="was changed after it was made"):
        read_probe(path)


def test_the_same_tokens_have_the_same_hash_in_every_format(tmp_path: Path) -> None:
    tokens = random_probe(100, 3, 5).batch["input_ids"]
    np.save(tmp_path / "b.npy", tokens.numpy().astype(np.int32))
    torch.save(tokens, tmp_path / "b.pt")
    torch.save({"input_ids": tokens}, tmp_path / "named.pt")
    save_file({"input_ids": tokens}, tmp_path / "b.safetensors")
    hashes = {read_probe(tmp_path / name).sha256 for name in ("b.npy", "b.pt", "named.pt", "b.safetensors")}
    assert hashes == {random_probe(100, 3, 5).sha256}


def test_files_that_are_no_probe_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "objects.npy", np.array([object()]), allow_pickle=True)
    torch.save({"input_ids": Path("x")}, tmp_path / "pickle.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "p.csv").write_text("1,2")
    for name in ("cut.safetensors", "cut.npy", "objects.npy", "pickle.pt", "list.pt", "p.csv", "nowhere.npy"):
        with pytest.raises(ProbeError) as caught:
            read_probe(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_ids": torch.full((2, 3), 32)}, "token ids 32 to 32, but .* takes 0 to 31"),
        ({"input_ids": torch.full((2, 3), -1)}, "token ids -1"),
        ({"input_ids": torch.zeros(2, 3, 4, dtype=torch.long)}, r"shape \(2, 3, 4\), expected \(sequences, length\)"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"shape \(5,\)"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"shape \(0, 5\)"),
        ({"inputs": torch.full((2, 3), torch.nan)}, "not finite"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, "differ in their number of sequences"),
        (
            {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.ones(2, 4).long()},
            "attention_mask has shape",
        ),
    ],
)
def test_a_probe_that_does_not_fit_is_refused(batch: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(ProbeError, match=says):
        check_probe(Probe(batch, "test"), load_model("tests.monitor.factories:tiny"))


def test_too_long_sequences_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32).save_pretrained(tmp_path)
    with pytest.raises(ProbeError, match="takes at most 32"):
        check_probe(random_probe(50, 2, 33), load_model(str(tmp_path)))


def test_a_model_gets_the_batch_as_its_forward_takes_it() -> None:
    tiny = load_model("tests.monitor.factories:tiny").module  # forward(tokens)
    assert isinstance(model_input(random_probe(32), tiny), torch.Tensor)

    class Named(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return input_ids

    assert isinstance(model_input(random_probe(32), Named()), dict)
    two = Probe({"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1, 2)}, "test")
    with pytest.raises(ProbeError, match="takes input_ids, attention_mask, but the probe holds input_ids, labels"):
        model_input(two, Named())


class TestText:
    """Text and a tokenizer folder -> tokens."""

    WORDS = 40

    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Path:
        tokenizers = pytest.importorskip("tokenizers")
        words = {f"w{i}": i for i in range(self.WORDS)} | {"[UNK]": self.WORDS}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.enable_truncation(3)  # a probe is cut by --length alone
        made.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def test_full_sequences_from_all_over_the_text(self, tokenizer: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text(" ".join(f"w{i // 100}" for i in range(100 * self.WORDS)))
        probe = text_probe(text, tokenizer, sequences=4, length=8)
        tokens = probe.batch["input_ids"]
        assert list(probe.batch) == ["input_ids"]
        assert tuple(tokens.shape) == (4, 8)
        assert int(tokens[-1].min()) >= self.WORDS // 2  # the last one begins in the second half

    def test_a_short_text_gives_fewer_sequences(self, tokenizer: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text(" ".join(["w1"] * 20))
        assert tuple(text_probe(text, tokenizer, sequences=4, length=8).batch["input_ids"].shape) == (2, 8)
        with pytest.raises(ProbeError, match="does not hold 21 tokens"):
            text_probe(text, tokenizer, sequences=4, length=21)

    def test_lines_are_prompts_and_padding_is_masked(self, tokenizer: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("w1 w2 w3\n\nw4\nw5 w6 w7 w8 w9\n")
        probe = text_probe(text, tokenizer, sequences=8, length=4, lines=True)
        assert probe.batch["input_ids"].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]]
        assert probe.batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]

    def test_no_tokenizer_there(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        text = tmp_path / "text.txt"
        text.write_text("w1")
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ProbeError) as caught:
                text_probe(text, folder)
            assert "\n" not in str(caught.value)


def test_the_hash_is_stored_beside_the_tensors(tmp_path: Path) -> None:
    write_probe(random_probe(10, 2, 3), tmp_path / "p.safetensors")
    assert list(load_file(tmp_path / "p.safetensors")) == ["input_ids"]
