"""Images: every published file form is read, nothing in a pickle is run, and held-out images are never trained on."""

import gzip
import importlib.util
import os
import pickle
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rksp_core.errors import ConfigError
from tests.training.real_data import need_data
from training.__main__ import main
from training.build import build_task
from training.config import read_config
from training.loop import train
from training.ranks import Ranks
from training.run import build_run
from training.schema.task import Images
from training.step import advance
from training.tasks import EVALUATION, PROBE, TRAINING
from training.tasks.image_sets import cifar10, class_folders, digits, fashion_mnist
from training.tasks.images import shifted_and_flipped

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
ALONE = Ranks(0, 1, torch.device("cpu"))
BATCHES = [*cifar10.TRAINING, *cifar10.HELD_OUT]


def pixels(batch: int, rows: int = 4) -> tuple[np.ndarray, list[int]]:
    """Pixels (rows, 3072) and labels of a batch of CIFAR-10 of our own."""
    random = np.random.default_rng(batch)
    return random.integers(0, 256, (rows, 3072), dtype=np.uint8), random.integers(0, 10, rows).tolist()


def as_binary(path: Path, data: np.ndarray, labels: list[int]) -> None:
    rows = np.column_stack([np.array(labels, dtype=np.uint8), data])
    path.with_name(f"{path.name}.bin").write_bytes(rows.tobytes())


def as_python_2(path: Path, data: np.ndarray, labels: list[int]) -> None:
    """The opcodes of the published files: protocol 2, byte strings, NumPy 1's names, 0 and 1 for False and True."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = number(data.shape[0]) + number(data.shape[1]) + b"\x86"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    path.write_bytes(
        b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + text(b"batch_label") + text(b"of us") + b"u."
    )


def as_python_3(path: Path, data: np.ndarray, labels: list[int]) -> None:
    path.write_bytes(pickle.dumps({b"data": data, b"labels": labels}, protocol=4))


@pytest.mark.parametrize("write", [as_binary, as_python_2, as_python_3])
def test_cifar10_in_each_form(tmp_path, write):
    for number, name in enumerate(BATCHES):
        write(tmp_path / name, *pixels(number))
    found = cifar10.read(tmp_path)
    assert found.training.images.shape == (20, 3, 32, 32)
    assert found.held_out.images.shape == (4, 3, 32, 32)
    data, labels = pixels(2)
    row, column = 5, 7
    assert found.training.images[9, :, row, column].tolist() == [
        data[1][1024 * c + 32 * row + column] for c in range(3)
    ]
    assert found.training.labels[8:12].tolist() == labels
    assert found.held_out.labels.tolist() == pixels(5)[1]


class Malicious:
    """A pickle of this calls a function when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "call",
    [
        lambda path: (os.system, f"touch {path}"),
        lambda path: (exec, f"import pathlib; pathlib.Path({str(path)!r}).touch()"),
        lambda path: (np.savetxt, str(path), [0]),
    ],
    ids=["os.system", "exec", "numpy.savetxt"],
)
def test_a_malicious_pickle_is_refused_before_it_runs(tmp_path, protocol, call):
    ran = tmp_path / "ran"
    content = {b"data": Malicious(*call(ran)), b"labels": [0]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(
        ConfigError, match=r"data_batch_1 is no batch of CIFAR-10 \(it asks for \w+\.\w+, which no array"
    ):
        cifar10.read(tmp_path)
    assert not ran.exists()
    pickle.loads(pickle.dumps(content))  # the pickle is a real one
    assert ran.exists()


def test_a_pickle_cannot_reach_an_attribute_of_what_it_may_name(tmp_path):
    name = b"ndarray.tofile"
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name + b"\x93.")
    with pytest.raises(ConfigError, match=r"it asks for numpy\.ndarray\.tofile"):
        cifar10.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, protocol=4), "its array has shape"),
        (pickle.dumps({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}, protocol=4), "its array has shape"),
        (pickle.dumps([1, 2]), "is no batch of CIFAR-10"),
        (b"", "is no batch of CIFAR-10"),
        (b"not a pickle", "is no batch of CIFAR-10"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_batch_of_cifar10(tmp_path, content, message):
    if content is not None:
        (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        cifar10.read(tmp_path)


def test_a_binary_batch_that_was_cut(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(ConfigError, match=r"data_batch_1\.bin has 3072 bytes, no multiple of 3073"):
        cifar10.read(tmp_path)


def write_idx(folder: Path, packed: bool, count: int = 6) -> dict[str, np.ndarray]:
    random, arrays = np.random.default_rng(0), {}
    for name, shape in (("images-idx3", (count, 5, 5)), ("labels-idx1", (count,))):
        for part in ("train", "t10k"):
            array = random.integers(0, 10, shape, dtype=np.uint8)
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            content, path = head + array.tobytes(), folder / f"{part}-{name}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
            arrays[f"{part}-{name}"] = array
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_as_they_are_and_compressed(tmp_path, packed):
    arrays, found = write_idx(tmp_path, packed), fashion_mnist.read(tmp_path)
    for part, name in ((found.training, "train"), (found.held_out, "t10k")):
        assert np.array_equal(part.images, arrays[f"{name}-images-idx3"][:, np.newaxis])
        assert np.array_equal(part.labels, arrays[f"{name}-labels-idx1"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_a_damaged_idx_file_is_named(tmp_path, packed, damage):
    write_idx(tmp_path, packed)
    path = tmp_path / f"t10k-images-idx3-ubyte{'.gz' * packed}"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "other":
        path.write_bytes((tmp_path / f"t10k-labels-idx1-ubyte{'.gz' * packed}").read_bytes())
    else:
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"task\.path: .*t10k-images-idx3-ubyte.*; expected a folder with train-images"
    ):
        fashion_mnist.read(tmp_path)


def write_classes(folder: Path, classes: str = "cat dog", count: int = 6, mode: str = "RGB", size=(10, 8)) -> Path:
    random = np.random.default_rng(len(folder.name))
    for label, name in enumerate(classes.split()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            array = random.integers(0, 40, (*size[::-1], 3), dtype=np.uint8) + np.uint8(100 * label)
            suffix = (".png", ".JPG", ".jpeg")[number % 3]
            Image.fromarray(array).convert(mode).save(folder / name / f"{number}{suffix}")
    return folder


def test_a_folder_of_class_folders_holds_a_fifth_out(tmp_path):
    task = build_task(Images(data="folder", path=str(write_classes(tmp_path / "all")), image=8), seed=0)
    held_out = sum(len(part.labels) for part in task.held_out.values())
    assert (len(task.training.labels), held_out) == (10, 2)
    assert task.training.images.shape == (10, 3, 8, 8)
    everything = np.concatenate([part.labels for part in (task.training, *task.held_out.values())])
    assert np.bincount(everything).tolist() == [6, 6]
    assert ((task.training.images.mean(axis=(1, 2, 3)) > 80) == (task.training.labels == 1)).all()


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_folder_may_set_its_own_images_aside(tmp_path, name):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / name, count=2)
    found = class_folders.read(tmp_path, 8, 3)
    assert (len(found.training.labels), len(found.held_out.labels)) == (12, 4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_colours_are_converted(tmp_path, mode, channels):
    found = class_folders.read(write_classes(tmp_path, mode=mode), 8, channels)
    assert found.training.images.shape == (12, channels, 8, 8)


def test_class_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        class_folders.read(tmp_path / "nowhere", 8, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images; expected a folder with one subfolder"):
        class_folders.read(tmp_path / "empty", 8, 3)
    write_classes(tmp_path / "two" / "train")
    write_classes(tmp_path / "two" / "test", "cat cow")
    with pytest.raises(ConfigError, match="has the classes cat, cow; expected those of"):
        class_folders.read(tmp_path / "two", 8, 3)
    (tmp_path / "two" / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"0\.png cannot be read"):
        class_folders.read(tmp_path / "two" / "train", 8, 3)


def csv(folder: Path, rows: int = 100) -> Path:
    """Digits of our own, each image different from the others."""
    random, path = np.random.default_rng(0), folder / "digits.csv"
    np.savetxt(path, np.column_stack([random.integers(0, 17, (rows, 64)), np.arange(rows) % 10]), "%d", ",")
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("a,b\n", "is no table of numbers"), ("1,2,3\n", "has rows of 3 numbers")],
)
def test_a_csv_that_holds_no_digits(tmp_path, content, message):
    if content is not None:
        (tmp_path / "digits.csv").write_text(content)
    with pytest.raises(ConfigError, match=message):
        digits.read(tmp_path / "digits.csv")


def test_digits_of_scikit_learn_are_those_of_its_csv():
    pytest.importorskip("sklearn")
    path = Path(importlib.util.find_spec("sklearn.datasets").origin).parent / "data" / "digits.csv.gz"
    packaged, read = digits.read(None).training, digits.read(path).training
    assert packaged.images.shape == (1797, 1, 8, 8)
    assert np.array_equal(packaged.images, read.images)
    assert np.array_equal(packaged.labels, read.labels)


def rows_of(batch) -> list[bytes]:
    return [image.numpy().tobytes() for image in batch.inputs]


def test_training_probe_and_evaluation_share_no_image(tmp_path):
    task = build_task(Images(data="digits", path=str(csv(tmp_path))), seed=0)
    sizes = {TRAINING: 80, PROBE: 2, EVALUATION: 18}
    seen = {stream: set(rows_of(task.batch(stream, 1, size))) for stream, size in sizes.items()}
    assert {stream: len(rows) for stream, rows in seen.items()} == sizes  # each image once an epoch
    assert len(set.union(*seen.values())) == 100
    assert task.evaluation_items == 18


def test_the_training_images_have_mean_0_and_variance_1(tmp_path):
    for number, name in enumerate(BATCHES):
        as_binary(tmp_path / name, *pixels(number))
    task = build_task(Images(data="cifar10", path=str(tmp_path)), seed=0)
    everything = task.batch(TRAINING, 1, 20).inputs.double()
    assert everything.mean(dim=(0, 2, 3)).abs().max() < 1e-6  # float32
    assert (everything.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_images_are_scaled_to_what_the_model_takes(tmp_path):
    small, large = (build_task(Images(data="digits", path=str(csv(tmp_path)), image=image), 0) for image in (4, 16))
    plain = build_task(Images(data="digits", path=str(csv(tmp_path))), 0).batch(TRAINING, 1, 5).inputs
    assert large.batch(TRAINING, 1, 5).inputs.shape == (5, 1, 16, 16)
    half = small.batch(TRAINING, 1, 5).inputs
    assert half.shape == (5, 1, 4, 4)
    assert torch.allclose(half.mean(dim=(2, 3)), plain.mean(dim=(2, 3)), atol=0.2)  # the border weighs a little more


@given(height=st.integers(4, 20), width=st.integers(4, 20), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_a_shifted_image_is_a_window_of_the_image_in_a_black_frame(height, width, channels, seed):
    images = np.random.default_rng(seed).integers(1, 256, (6, channels, height, width), dtype=np.uint8)
    edge = max(1, height // 8)
    moved = shifted_and_flipped(images, np.random.default_rng(seed))
    assert (moved.shape, moved.dtype) == (images.shape, np.uint8)
    assert np.array_equal(moved, shifted_and_flipped(images, np.random.default_rng(seed)))
    for before, after in zip(images, moved, strict=True):
        frame = np.zeros((channels, height + 2 * edge, width + 2 * edge), dtype=np.uint8)
        frame[:, edge:-edge, edge:-edge] = before
        places = [(y, x) for y in range(2 * edge + 1) for x in range(2 * edge + 1)]
        windows = [frame[:, y : y + height, x : x + width] for y, x in places]
        assert any(np.array_equal(after, each) or np.array_equal(after, each[..., ::-1]) for each in windows)


def test_only_training_images_are_augmented_and_at_each_step_anew(tmp_path):
    plain, augmented = (
        build_task(Images(data="digits", path=str(csv(tmp_path)), augment=on), 0) for on in (False, True)
    )
    for stream in (PROBE, EVALUATION):
        assert torch.equal(plain.batch(stream, 0, 2).inputs, augmented.batch(stream, 0, 2).inputs)
    epochs = [set(rows_of(augmented.batch(TRAINING, step, 80))) for step in (1, 2, 3)]
    for one, other in pairwise(epochs):
        assert len(one & other) < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere"}, "task.path: nowhere cannot be read"),
        ({"channels": 3}, "the images of digits have 1 channels, the model 3; set model.arguments.channels"),
        ({"classes": 9}, "digits has 10 classes, the model 9; set model.arguments.classes"),
        ({"data": "folder", "path": "nowhere", "image": None}, "task.data = 'folder' needs task.image"),
        ({"data": "fashion_mnist", "path": "nowhere"}, "(Debian: apt-get install dataset-fashion-mnist)"),
    ],
)
def test_images_that_do_not_fit_are_one_sentence(tmp_path, capsys, changes, message):
    task = {"name": "images", "data": "digits", "path": str(csv(tmp_path)), "image": 8, "channels": 1, "classes": 10}
    model = {"factory": "training.models.gpt:GPT", "arguments": {"vocabulary": 8, "length": 8}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "run"), "model": model, "task": task | changes}))
    assert main([str(path), "--check"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_two_images_cannot_be_split(tmp_path):
    with pytest.raises(ConfigError, match="digits holds out 1 images; at least 2 are needed"):
        build_task(Images(data="digits", path=str(csv(tmp_path, 5))), seed=0)


def test_the_configuration_of_cifar10_trains_on_files_like_its_own(tmp_path):
    for number, name in enumerate(BATCHES):
        as_python_2(tmp_path / name, *pixels(number))
    changes = {"task.path": tmp_path, "task.batch": 2, "model.arguments.depth": 1, "output": tmp_path / "run"}
    path = CONFIGS / "cifar10_vit.yaml"
    run = build_run(read_config(path, [f"{key}={value}" for key, value in changes.items()]), ALONE)
    assert run.task.batch(TRAINING, 1, 2).inputs.shape == (2, 3, 224, 224)
    assert 1.5 < advance(run).loss < 3.5  # ten classes, nothing learned yet: near ln 10 = 2.30


@pytest.mark.real
def test_digits_are_learned(tmp_path):
    """The shipped configuration, cut to 150 steps and two blocks: guessing is right one time in ten."""
    changes = [f"output={tmp_path / 'run'}", "steps=150", "schedule.warmup=20", "model.arguments.depth=2"]
    config = read_config(CONFIGS / "digits_vit.yaml", changes)
    need_data(config.task)
    assert train(config, ALONE)["accuracy"] > 0.7


@pytest.mark.real
def test_fashion_mnist_is_the_published_one():
    section = Images(data="fashion_mnist")
    need_data(section)
    task = build_task(section, seed=0)
    assert task.training.images.shape == (60_000, 1, 28, 28)
    assert sum(len(part.labels) for part in task.held_out.values()) == 10_000
    assert np.bincount(task.training.labels).tolist() == [6_000] * 10
    # the constants that are used for it everywhere, to their four digits
    assert task.mean.item() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert task.deviation.item() / 255 == pytest.approx(0.3530, abs=5e-5)
