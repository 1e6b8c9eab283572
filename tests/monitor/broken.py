"""Checkpoints that are broken in every way we could think of, each with the class and the sentence it deserves.

Each case is written into a run folder under a step of its own. The good ones of each format are among them: a change
that makes a reader refuse everything is found out as well. What depends on the moment (a file that vanishes or is
replaced while it is read) is tried by `tests.soak.broken_checkpoints`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from tests.monitor import tiny_model

MODEL = "tests.monitor.tiny_model:build"
ARGUMENTS = {"width": 8, "depth": 1}

FORMATS = ("pt", "safetensors", "sharded", "huggingface", "dcp")
DONE, FAILED, EITHER = frozenset({"done"}), frozenset({"failed"}), frozenset({"done", "failed"})
UNSEEN = "unseen"  # no row at all: nothing says that it is a checkpoint
NEVER_FINISHED = "never finished"

GIBI = 2**30
LONGEST_SENTENCE = 600


@dataclass(frozen=True)
class Case:
    """One checkpoint. ``statuses`` are the classes it may get, ``sentence`` a pattern that its problem must hold.

    ``make`` writes it for a step into a run folder. ``reads`` is False where a test must not read it in its own
    process: it asks for too much memory, or depends on permissions.
    """

    name: str
    make: Callable[[Path, int], Path]
    statuses: frozenset[str]
    sentence: str = ""
    reads: bool = True

    def complaint(self, status: str, error: str) -> str:
        """Return what is wrong with an outcome, or ""."""
        if status not in self.statuses:
            return f"{self.name}: {status} ({error!r}), expected {' or '.join(sorted(self.statuses))}"
        if status in ("done", UNSEEN):
            return ""
        if "\n" in error or not error or len(error) > LONGEST_SENTENCE:
            return f"{self.name}: {status}, but its problem is not one sentence: {error!r}"
        if re.search(self.sentence, error) is None:
            return f"{self.name}: {status}, but its problem does not say {self.sentence!r}: {error!r}"
        return ""


def cases(templates: Path, canary: Path, *, every: int = 2, flips: int = 24) -> Iterator[Case]:
    """Yield every case.

    Parameters
    ----------
    templates
        A folder for the good checkpoints that the broken ones are made of, outside every run folder.
    canary
        A file that exists once a checkpoint's code ran.
    every
        Percent between two truncations.
    flips
        Bits flipped in the header, and as many in the body, of each format.
    """
    good = {name: _original(templates, name) for name in FORMATS}
    for name in FORMATS:
        yield Case(f"{name}: good", _copied(name, good[name]), DONE)
        yield from _truncated(name, good[name], every)
        yield from _flipped(name, good[name], flips)
        yield from _of_other_content(templates, name)
    yield from _shards(good)
    yield from _claims(templates)
    yield from _code(templates, canary, good)
    yield from _places(templates, good)


# -- good ones


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Return a state dict of the model that `ARGUMENTS` describe; the tied head is stored once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = tiny_model.build(**ARGUMENTS).state_dict()
    del state["head.weight"]
    return state


def path_in(run: Path, name: str, step: int) -> Path:
    """Return where a checkpoint of a format and step lies in a run folder."""
    places = {
        "pt": run / f"step-{step}.pt",
        "safetensors": run / f"step-{step}.safetensors",
        "sharded": run / "checkpoints" / f"step-{step:08d}",
        "huggingface": run / f"checkpoint-{step}",
        "dcp": run / "checkpoint" / f"step-{step}",
    }
    return places[name]


def write(path: Path, name: str, state: Mapping[str, Tensor]) -> Path:
    """Write a state dict in a format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "pt":
        torch.save({"model": dict(state), "step": 1}, path)
    elif name == "safetensors":
        save_file(dict(state), path)
    elif name == "sharded":
        _write_shards(path, state)
    elif name == "huggingface":
        path.mkdir()
        save_file(dict(state), path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"model_type": "tiny"}))
        (path / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    else:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it is meant to be one process
            dcp.save({"model": dict(state)}, checkpoint_id=path)
    return path


def _write_shards(path: Path, state: Mapping[str, Tensor]) -> None:
    path.mkdir()
    names, half = sorted(state), len(state) // 2
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[:half], names[half:]), strict=True):
        save_file({name: state[name] for name in part}, path / file)
    index = {name: files[position >= half] for position, name in enumerate(names)}
    size = sum(value.nbytes for value in state.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )


def _original(templates: Path, name: str) -> Path:
    return write(path_in(templates / "good", name, 1), name, weights())


def _copied(name: str, original: Path) -> Callable[[Path, int], Path]:
    def make(run: Path, step: int) -> Path:
        return _copy(original, path_in(run, name, step))

    return make


def _copy(original: Path, path: Path) -> Path:
    """Write under a dot name and rename, so that it is complete, as far as it ever is, once it is seen."""
    staging = path.with_name(f".{path.name}.tmp")
    staging.parent.mkdir(parents=True, exist_ok=True)
    if original.is_dir():
        shutil.copytree(original, staging, symlinks=True)
    else:
        shutil.copy(original, staging)
    return staging.rename(path)


def _changed(name: str, original: Path, change: Callable[[Path], Any]) -> Callable[[Path, int], Path]:
    """Return a maker that changes a copy before it is renamed into place."""

    def make(run: Path, step: int) -> Path:
        path = path_in(run, name, step)
        staging = _copy(original, path.with_name(f".{path.name}.change"))
        change(staging)
        return staging.rename(path)

    return make


def _parts(name: str, path: Path) -> list[Path]:
    """Return the files that hold a format's weights and say what they are; relative to the checkpoint."""
    if path.is_file():
        return [Path()]
    wanted = {"sharded": ("model*",), "huggingface": ("model.safetensors",), "dcp": (".metadata", "*.distcp")}[name]
    return sorted(found.relative_to(path) for pattern in wanted for found in path.glob(pattern))


# -- cut short, and bits that flipped


def _truncated(name: str, original: Path, every: int) -> Iterator[Case]:
    for part in _parts(name, original):
        for percent in range(0, 100, every):
            label = f"{name}: {part.name or 'file'} cut at {percent} %"
            # A pickle that is cut right after a byte that could be its last looks whole, and wrong.
            sentence = f"{NEVER_FINISHED}|no metadata" if part.name == ".metadata" else NEVER_FINISHED
            yield Case(label, _changed(name, original, _Cut(part, percent)), FAILED, sentence)


@dataclass(frozen=True)
class _Cut:
    part: Path
    percent: int

    def __call__(self, path: Path) -> None:
        file = path / self.part
        os.truncate(file, file.stat().st_size * self.percent // 100)


@dataclass(frozen=True)
class _Flip:
    part: Path
    place: int
    bit: int

    def __call__(self, path: Path) -> None:
        with (path / self.part).open("r+b") as stream:
            stream.seek(self.place)
            byte = stream.read(1)[0]
            stream.seek(self.place)
            stream.write(bytes([byte ^ 1 << self.bit]))


def _flipped(name: str, original: Path, flips: int) -> Iterator[Case]:
    """Flip bits: safetensors finds every one in a header and none in the body, a zip archive has checksums of both."""
    rng = random.Random(name)
    for part in _parts(name, original):
        header, body = _regions(original / part)
        plain = part.suffix == ".safetensors" or name == "safetensors"
        # Between the members of a zip archive, some bits carry nothing, such as dates.
        regions = (("header", header, FAILED if plain else EITHER), ("body", body, DONE if plain else FAILED))
        for where, places, statuses in regions:
            for _ in range(flips if places else 0):
                flip = _Flip(part, rng.choice(places), rng.randrange(8))
                label = f"{name}: {part.name or 'file'}, bit {flip.bit} of byte {flip.place} ({where}) flipped"
                sentence = "checksum" if where == "body" else "."
                yield Case(label, _changed(name, original, flip), statuses, sentence)


def _regions(file: Path) -> tuple[list[int], list[int]]:
    """Return the bytes of a file that describe, and those that are numbers of tensors."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        start = 8 + int.from_bytes(data[:8], "little")
        return list(range(start)), list(range(start, len(data)))
    body: set[int] = set()
    for archive_at in [0] if file.suffix == ".pt" else _archives(data):
        with zipfile.ZipFile(io.BytesIO(data[archive_at:])) as archive:
            for info in archive.infolist():
                if re.search(r"/data/\d+$", info.filename):
                    begin = archive_at + info.header_offset + 30
                    begin += sum(struct.unpack_from("<HH", data, begin - 4))
                    body |= set(range(begin, begin + info.file_size))
        if file.suffix != ".pt":
            break  # the other pieces of a shard are alike
    return [place for place in range(len(data)) if place not in body][:4096], sorted(body)


def _archives(data: bytes) -> list[int]:
    """Return where the zip archives in a shard of DCP begin; the first one ends where the second begins."""
    return [0] if data.startswith(b"PK") else []


# -- other content


def _of_other_content(templates: Path, name: str) -> Iterator[Case]:
    """Well-formed checkpoints whose content is wrong."""

    def of(label: str, state: Mapping[str, Tensor], statuses: frozenset[str], sentence: str = "") -> Case:
        original = write(path_in(templates / label.replace(" ", "-"), name, 1), name, state)
        return Case(f"{name}: {label}", _copied(name, original), statuses, sentence)

    state = weights()
    first = "blocks.0.up.weight"
    yield of("another width", tiny_weights(width=6), FAILED, "shape")
    yield of("a transposed weight", {**state, first: state[first].T.contiguous()}, FAILED, rf"{first} is \(8, 16\)")
    yield of(
        "a missing weight", {key: value for key, value in state.items() if key != first}, FAILED, f"missing {first}"
    )
    yield of("an extra key", {**state, "stranger": torch.ones(3)}, EITHER, "stranger")
    yield of("float64", {key: value.double() for key, value in state.items()}, DONE)
    yield of("bfloat16", {key: value.bfloat16() for key, value in state.items()}, DONE)
    yield of("integers for weights", {**state, first: state[first].long()}, FAILED, "int64|I64|dtype|integer")
    yield of("booleans for weights", {**state, first: state[first] > 0}, FAILED, "bool|dtype")
    yield of("NaN", {**state, first: torch.full_like(state[first], torch.nan)}, DONE)
    yield of("infinity", {**state, first: torch.full_like(state[first], torch.inf)}, DONE)
    yield of("nothing of the model", {"stranger": torch.ones(3)}, FAILED, "missing|no model|no state dict")


def tiny_weights(width: int) -> dict[str, Tensor]:
    """Return the weights of a model of another width."""
    state = tiny_model.build(width=width, depth=1).state_dict()
    del state["head.weight"]
    return state


def _shards(good: Mapping[str, Path]) -> Iterator[Case]:
    def case(label: str, name: str, change: Callable[[Path], Any], statuses: frozenset[str], sentence: str) -> Case:
        return Case(f"{name}: {label}", _changed(name, good[name], change), statuses, sentence)

    second = "model-00002-of-00002.safetensors"
    index = "model.safetensors.index.json"

    def edit(**entries: Any) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            document = json.loads((path / index).read_text())
            document["weight_map"] |= entries
            (path / index).write_text(json.dumps(document))

        return change

    yield case(
        "a missing shard", "sharded", lambda path: (path / second).unlink(), FAILED, f"{NEVER_FINISHED}.*{second}"
    )
    yield case("no index", "sharded", lambda path: (path / index).unlink(), frozenset({"failed", UNSEEN}), ".")
    yield case("an index that is no JSON", "sharded", lambda path: (path / index).write_text("{]}"), FAILED, ".")
    yield case("an index that is a list", "sharded", lambda path: (path / index).write_text("[1]"), FAILED, ".")
    yield case("a weight in no shard", "sharded", edit(stranger=second), FAILED, "stranger")
    yield case(
        "a shard outside", "sharded", edit(**{"embedding.weight": "../../../outside.safetensors"}), FAILED, "outside"
    )
    yield case("a shard at an absolute path", "sharded", edit(**{"embedding.weight": "/etc/passwd"}), FAILED, "passwd")
    yield case("a shard that is a number", "sharded", edit(**{"embedding.weight": 7}), FAILED, ".")
    yield case("a missing shard", "dcp", lambda path: next(path.glob("*.distcp")).unlink(), FAILED, NEVER_FINISHED)
    yield case("no .metadata", "dcp", lambda path: (path / ".metadata").unlink(), FAILED, NEVER_FINISHED)
    yield case("no trainer_state.json", "huggingface", lambda path: (path / "trainer_state.json").unlink(), EITHER, ".")
    yield case(
        "an empty folder of weights", "huggingface", lambda path: (path / "model.safetensors").unlink(),
        frozenset({"failed", UNSEEN}), ".",
    )  # fmt: skip


# -- what asks for too much


def _claims(templates: Path) -> Iterator[Case]:
    def safetensors(header: bytes, length: int | None = None, size: int | None = None) -> Callable[[Path, int], Path]:
        def make(run: Path, step: int) -> Path:
            staging = run / f".step-{step}.tmp"
            staging.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
            if size is not None:
                os.truncate(staging, 8 + len(header) + size)  # a hole: it takes no room on the disk
            return staging.rename(path_in(run, "safetensors", step))

        return make

    def described(shape: list[int], size: int) -> bytes:
        return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()

    yield Case("safetensors: a header of 2^60 bytes", safetensors(b"{}", 2**60), FAILED, "header of|cut short")
    yield Case("safetensors: a tensor of 2^60 bytes", safetensors(described([2**58], 2**60)), FAILED, NEVER_FINISHED)
    yield Case("safetensors: a tensor of -1 numbers", safetensors(described([-1], 8), None, 8), FAILED, "disagree")
    yield Case("safetensors: a shape of 2^60 x 0", safetensors(described([2**60, 0], 0)), FAILED, "missing|shape|fit")
    yield Case(
        "safetensors: 16 GiB that are there, as a hole", safetensors(described([4 * GIBI], 16 * GIBI), None, 16 * GIBI),
        FAILED, "missing|fit", reads=False,
    )  # fmt: skip
    nested = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield Case("safetensors: a header nested 100 000 deep", safetensors(nested), FAILED, "no JSON")
    numbers = b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'
    yield Case("safetensors: a number of 5000 digits", safetensors(numbers, None, 8), FAILED, ".")

    def archive(pickled: bytes, compression: int, storage: bytes = b"") -> Callable[[Path, int], Path]:
        def make(run: Path, step: int) -> Path:
            staging = run / f".step-{step}.tmp"
            with zipfile.ZipFile(staging, "w", compression) as file:
                for name, data in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
                    file.writestr(f"archive/{name}", data)
                file.writestr("archive/data/0", storage)
            return staging.rename(path_in(run, "pt", step))

        return make

    yield Case("pt: a zip bomb, 1 GiB of zeros in a few MiB", _bomb(templates), FAILED, ".", reads=False)
    as_numbers = _bomb(templates, as_numbers=True)
    yield Case("pt: a zip bomb in the place of a tensor", as_numbers, FAILED, ".", reads=False)
    huge = _pickled_storage(2**60)
    yield Case("pt: a storage of 2^60 numbers", archive(huge, zipfile.ZIP_STORED, bytes(64)), FAILED, ".", reads=False)
    stored = _pickled_storage(16)
    yield Case("pt: a storage shorter than it says", archive(stored, zipfile.ZIP_STORED, bytes(8)), FAILED, ".")
    yield Case("pt: a zip archive of something else", archive(b"hello", zipfile.ZIP_STORED), FAILED, ".")
    yield Case("pt: no zip archive", _bytes("pt", b"hello, this is no checkpoint"), FAILED, "no zip archive")
    yield Case("pt: empty", _bytes("pt", b""), FAILED, NEVER_FINISHED)
    yield Case("safetensors: empty", _bytes("safetensors", b""), FAILED, NEVER_FINISHED)
    yield Case("safetensors: zeros", _bytes("safetensors", bytes(4096)), FAILED, ".")

    metadata = _metadata(templates)
    yield Case(
        "dcp: a tensor of 2^60 numbers",
        _metadata_with(metadata, size=2**60),
        FAILED,
        "size|damaged|shard|fit",
        reads=False,
    )
    yield Case("dcp: a piece of 2^60 bytes", _metadata_with(metadata, length=2**60), FAILED, NEVER_FINISHED)
    yield Case("dcp: a piece of -1 bytes", _metadata_with(metadata, length=-1), FAILED, "whole number|no metadata")
    yield Case("dcp: a shard outside", _metadata_with(metadata, relative_path="../../outside.distcp"), FAILED, ".")


def _bytes(name: str, data: bytes) -> Callable[[Path, int], Path]:
    def make(run: Path, step: int) -> Path:
        path = path_in(run, name, step)
        path.write_bytes(data)
        return path

    return make


def _bomb(templates: Path, *, as_numbers: bool = False) -> Callable[[Path, int], Path]:
    """Write 1 GiB of zeros that a zip archive holds in a few MiB, as its pickle or as a tensor's numbers."""
    original = templates / f"bomb-{as_numbers}.pt"

    def make(run: Path, step: int) -> Path:
        chunk = bytes(2**24)
        with zipfile.ZipFile(original, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            with file.open(f"archive/{'data/0' if as_numbers else 'data.pkl'}", "w", force_zip64=True) as stream:
                for _ in range(GIBI // len(chunk)):
                    stream.write(chunk)
            if as_numbers:
                file.writestr("archive/data.pkl", _pickled_storage(GIBI // 4))
            file.writestr("archive/version", b"3\n")
        return _copy(original, path_in(run, "pt", step))

    return make


class _StoragePickler(pickle.Pickler):
    """Pickles a state dict of one tensor over a storage that claims to have so many numbers."""

    count = 0

    def persistent_id(self, thing: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", self.count) if thing is _STORAGE else None


class _Stored:
    """A tensor that is rebuilt on a stored storage."""

    count = 0

    def __reduce__(self) -> tuple[Any, ...]:
        from collections import OrderedDict

        return torch._utils._rebuild_tensor_v2, (_STORAGE, 0, (self.count,), (1,), False, OrderedDict())


_STORAGE = object()


def _pickled_storage(count: int) -> bytes:
    stream, stored = io.BytesIO(), _Stored()
    pickler = _StoragePickler(stream, protocol=2)
    pickler.count = stored.count = count
    pickler.dump({"embedding.weight": stored})
    return stream.getvalue()


def _metadata(templates: Path) -> Path:
    return templates / "good" / "checkpoint" / "step-1"


def _metadata_with(original: Path, *, size: int | None = None, **fields: Any) -> Callable[[Path, int], Path]:
    """Change what .metadata says of its first piece, or of the size of its first tensor."""

    def change(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        index, info = next(iter(metadata.storage_data.items()))
        metadata.storage_data[index] = dataclasses.replace(info, **fields)
        if size is not None:
            metadata.state_dict_metadata[index.fqn].size = torch.Size([size])
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return _changed("dcp", original, change)


# -- code


@dataclass(frozen=True)
class _Harm:
    """Unpickling this runs code: it makes the canary."""

    canary: str

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def _code(templates: Path, canary: Path, good: Mapping[str, Path]) -> Iterator[Case]:
    harm = _Harm(str(canary))
    pt = templates / "harm.pt"
    torch.save({"model": weights(), "harm": harm}, pt)
    yield Case("pt: a pickle that runs a command", _copied("pt", pt), FAILED, "never loaded|objects")
    yield Case("pt: a bare pickle that runs a command", _bytes("pt", pickle.dumps(harm)), FAILED, "no zip archive")
    old = templates / "old.pt"
    torch.save({"model": weights(), "harm": harm}, old, _use_new_zipfile_serialization=False)
    yield Case("pt: of before 1.6, that runs a command", _copied("pt", old), FAILED, "no zip archive")

    def replace_metadata(path: Path) -> None:
        (path / ".metadata").write_bytes(pickle.dumps(harm))

    yield Case(
        "dcp: a .metadata that runs a command", _changed("dcp", good["dcp"], replace_metadata), FAILED, "not loaded"
    )

    def replace_piece(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        index, info = next(iter(metadata.storage_data.items()))
        stream = io.BytesIO()
        torch.save(harm, stream)
        with (path / info.relative_path).open("ab") as shard:
            offset = shard.tell()
            shard.write(stream.getvalue())
        changed = dataclasses.replace(info, offset=offset, length=len(stream.getvalue()))
        metadata.storage_data[index] = changed
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    yield Case(
        "dcp: a piece that runs a command", _changed("dcp", good["dcp"], replace_piece), FAILED, "objects|damaged"
    )

    def binary(path: Path) -> None:
        (path / "model.safetensors").unlink()
        torch.save({**weights(), "harm": harm}, path / "pytorch_model.bin")

    yield Case(
        "huggingface: a .bin that runs a command",
        _changed("huggingface", good["huggingface"], binary),
        FAILED,
        "never loaded|objects",
    )


# -- places


def _places(templates: Path, good: Mapping[str, Path]) -> Iterator[Case]:
    elsewhere = templates / "elsewhere"
    outside = write(path_in(elsewhere, "safetensors", 1), "safetensors", weights())
    folder = write(path_in(elsewhere, "huggingface", 1), "huggingface", weights())

    def link(name: str, target: Path) -> Callable[[Path, int], Path]:
        def make(run: Path, step: int) -> Path:
            path = path_in(run, name, step)
            path.symlink_to(target)
            return path

        return make

    # A link is a way to lay a run over several disks. What it leads to is read as any other file: it runs no code.
    yield Case("safetensors: a link out of the folder", link("safetensors", outside), EITHER, "link|outside")
    yield Case("huggingface: a link out of the folder", link("huggingface", folder), EITHER, "link|outside")
    yield Case("safetensors: a link to something else", link("safetensors", Path("/etc/passwd")), FAILED, ".")
    yield Case(
        "safetensors: a link to nothing", link("safetensors", elsewhere / "none"), frozenset({UNSEEN, "expired"}), "."
    )
    yield Case(
        "safetensors: a link to a device",
        link("safetensors", Path("/dev/zero")),
        frozenset({UNSEEN, "failed"}),
        ".",
        reads=False,
    )

    def circle(run: Path, step: int) -> Path:
        path = path_in(run, "safetensors", step)
        path.symlink_to(path.name)
        return path

    yield Case("safetensors: a link to itself", circle, frozenset({UNSEEN, "failed", "expired"}), ".")

    def newline(run: Path, step: int) -> Path:
        return _copy(good["safetensors"], run / f'step-{step}\n{{"event": "forged"}}\r-step-{step}.safetensors')

    yield Case("safetensors: a name with a newline", newline, frozenset({"done", UNSEEN}))

    def spoilt(run: Path, step: int) -> Path:
        path = run / f'step-{step}\n"forged".safetensors'
        path.write_bytes(b"\xff" * 64)
        return path

    yield Case("safetensors: a bad one whose name has a newline", spoilt, frozenset({"failed", UNSEEN}), "header")

    def pipe(run: Path, step: int) -> Path:
        path = path_in(run, "safetensors", step)
        os.mkfifo(path)
        return path

    yield Case("safetensors: a pipe that nobody writes", pipe, frozenset({UNSEEN, "failed"}), ".", reads=False)

    def closed(name: str) -> Callable[[Path, int], Path]:
        def make(run: Path, step: int) -> Path:
            path = _copy(good[name], path_in(run, name, step))
            path.chmod(0)
            return path

        return make

    denied = "no permission|[Pp]ermission denied"
    for name in ("safetensors", "pt", "huggingface", "dcp", "sharded"):
        yield Case(f"{name}: no permission", closed(name), FAILED, denied, reads=False)
