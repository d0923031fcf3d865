"""Data sets by name: what they hold, in which order it comes, and which files are refused."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from layerlens.data import IMAGENET_MEAN, IMAGENET_STD, Dataset, dataset_from_arrays, load_data, to_unit
from layerlens.errors import ConfigError, DataError, DownloadError, UnknownNameError


def arrays(**changed: object) -> dict[str, object]:
    """Six and four tiny images with labels, as an npz file holds them; None leaves an entry out."""
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8), "y_train": np.arange(6) % 3,
        "x_test": rng.integers(0, 256, (4, 4, 4, 3), dtype=np.uint8), "y_test": np.arange(4) % 3,
    }  # fmt: skip
    return {key: value for key, value in {**made, **changed}.items() if value is not None}


def npz(folder: Path, **changed: object) -> str:
    np.savez(folder / "data.npz", **arrays(**changed))
    return f"npz:{folder / 'data.npz'}"


def numbered(count: int) -> Dataset:
    """Images whose one pixel value is their number, with that number as label."""
    x, y = np.arange(count, dtype=np.float32).reshape(count, 1, 1) / count, np.arange(count)
    return dataset_from_arrays("numbered", x, y, x, y)


# --- digits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


def test_digits_shapes_types_and_classes(digits):
    assert (digits.x_train.shape, digits.x_train.dtype) == ((1437, 1, 8, 8), torch.uint8)
    assert (digits.x_test.shape, digits.x_test.dtype) == ((360, 1, 8, 8), torch.uint8)
    assert (digits.y_train.shape, digits.y_train.dtype) == ((1437,), torch.int64)
    assert (digits.y_test.shape, digits.y_test.dtype) == ((360,), torch.int64)
    assert digits.input_shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert not digits.flip


def test_digits_split_is_the_same_every_time(digits):
    again = load_data("digits")
    assert torch.equal(again.x_train, digits.x_train)
    assert torch.equal(again.y_test, digits.y_test)
    assert again.fingerprint() == digits.fingerprint()


def test_digits_are_sklearns_images_each_once_with_its_label(digits):
    images, labels = load_digits(return_X_y=True)
    theirs = [(np.round(x * 255 / 16).astype(np.uint8).tobytes(), y) for x, y in zip(images, labels, strict=True)]
    pairs = [pair for part in ("train", "test") for pair in zip(*digits.split(part), strict=True)]
    assert sorted((x.numpy().tobytes(), int(y)) for x, y in pairs) == sorted(theirs)


def test_digits_split_is_stratified(digits):
    assert digits.y_test.bincount().tolist() == pytest.approx([36] * 10, abs=1)


def test_own_statistics_normalise_the_training_split(digits):
    unit = digits.x_train.double() / 255
    assert digits.mean == pytest.approx((unit.mean().item(),), abs=1e-6)
    assert digits.std == pytest.approx((unit.std(correction=0).item(),), abs=1e-6)
    seen = digits.normalize(digits.x_train)
    assert seen.dtype == torch.float32
    assert seen.mean().item() == pytest.approx(0, abs=1e-4)
    assert seen.std().item() == pytest.approx(1, abs=1e-3)


def test_split_refuses_another_name(digits):
    with pytest.raises(UnknownNameError, match="no split 'val'; allowed: train, test"):
        digits.split("val")


# --- normalisation -----------------------------------------------------------------------------------------------


def test_statistics_worked_by_hand(tmp_path):
    x = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    x[1, ..., 0], x[:, 0, :, 1], x[..., 2] = 255, 51, 102
    data = load_data(npz(tmp_path, x_train=x, x_test=x, y_train=None, y_test=None))
    assert data.mean == pytest.approx((0.5, 0.1, 0.4), abs=1e-6)
    assert data.std == pytest.approx((0.5, 0.1, 1.0), abs=1e-6)  # a constant channel keeps its scale


def test_statistics_do_not_look_at_the_test_split(tmp_path):
    data = load_data(npz(tmp_path))
    other = load_data(npz(tmp_path, x_test=np.zeros((4, 4, 4, 3), np.uint8)))
    assert (other.mean, other.std) == (data.mean, data.std)


def test_normalize_worked_by_hand():
    data = replace(numbered(2), mean=(0.5,), std=(0.25,))
    assert data.normalize(torch.tensor([[[[255]]], [[[0]]]], dtype=torch.uint8)).flatten().tolist() == [2.0, -2.0]
    assert data.normalize(torch.tensor([[[[0.75]]]])).flatten().tolist() == [1.0]


def test_normalize_none_leaves_the_unit_scale(tmp_path):
    data = load_data(npz(tmp_path) + ",normalize=none")
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)
    assert torch.equal(data.normalize(data.x_test), data.x_test.float() / 255)


def test_normalize_imagenet_takes_its_statistics(tmp_path):
    data = load_data(npz(tmp_path) + ",normalize=imagenet")
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (IMAGENET_MEAN, IMAGENET_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_normalize_imagenet_needs_three_channels():
    with pytest.raises(DataError, match=r"normalize=imagenet needs 3 channels; digits.* has 1"):
        load_data("digits,normalize=imagenet")


@pytest.mark.parametrize("value", ["zscore", "1", "Imagenet"])
def test_normalize_unknown_is_an_error(value):
    with pytest.raises(DataError, match=r"normalize=.* is unknown; allowed: imagenet, none"):
        load_data(f"digits,normalize={value}")


def test_to_unit_scales_bytes_and_leaves_floats():
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert to_unit(torch.tensor([0.25], dtype=torch.float64)).dtype == torch.float32


# --- unknown names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "message"), [
    ("digts", "unknown data 'digts'; closest: digits"),
    ("imagnet:/x", "unknown data 'imagnet:/x'.*or pkg.module:factory"),
])  # fmt: skip
def test_unknown_data_names_the_closest(spec, message):
    with pytest.raises(UnknownNameError, match=message):
        load_data(spec)


@pytest.mark.parametrize(("spec", "option"), [("digits,size=3", "size"), ("npz:x.npz,normalise=none", "normalise")])
def test_unknown_options_are_an_error(spec, option):
    with pytest.raises(ConfigError, match=f"has no option '{option}'"):
        load_data(spec)


# --- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 8, 8), (1, 8, 8)), ((5, 8, 6, 1), (1, 8, 6)), ((5, 8, 6, 3), (3, 8, 6)), ((5, 3, 8, 6), (3, 8, 6)),
     ((5, 1, 8, 6), (1, 8, 6))],
)  # fmt: skip
def test_images_of_every_allowed_shape_become_channels_first(shape, expected):
    x = np.zeros(shape, dtype=np.uint8)
    assert dataset_from_arrays("x", x, None, x, None).input_shape == expected


def test_channels_last_images_keep_their_pixels():
    x = arrays()["x_train"]
    data = dataset_from_arrays("x", x, None, x, None)
    assert torch.equal(data.x_train[2, 1], torch.tensor(x[2, :, :, 1]))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [(np.uint8([[[0, 255]]]), torch.uint8), (np.int64([[[0, 255]]]), torch.uint8),
     (np.uint16([[[0, 255]]]), torch.uint8),
     (np.float64([[[0, 1]]]), torch.float32), (np.float16([[[0, 1]]]), torch.float32),
     (torch.tensor([[[0.0, 1.0]]]), torch.float32), (np.array([[[0, 1]]], dtype=">f4"), torch.float32),
     (np.uint8([[[255, 0]]])[..., ::-1], torch.uint8)],
    ids=["uint8", "int64", "uint16", "float64", "float16", "tensor", "big-endian", "reversed view"],
)  # fmt: skip
def test_images_are_held_as_bytes_or_floats(values, dtype):
    data = dataset_from_arrays("x", values, None, values, None)
    assert data.x_train.dtype == dtype
    assert to_unit(data.x_train).flatten().tolist() == [0.0, 1.0]


def test_labels_may_be_missing():
    data = dataset_from_arrays("x", arrays()["x_train"], None, arrays()["x_test"], None)
    assert (data.y_train, data.y_test, data.classes) == (None, None, ())


def test_class_names_count_up_to_the_highest_label_of_either_split():
    data = dataset_from_arrays(
        "x", *(arrays(y_test=np.array([0, 1, 2, 5]))[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    )
    assert data.classes == ("0", "1", "2", "3", "4", "5")


def test_class_names_may_be_given():
    parts = [arrays()[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    assert dataset_from_arrays("x", *parts, classes=["a", "b", "c"]).classes == ("a", "b", "c")
    with pytest.raises(DataError, match="x: label 2 but only 2 class names"):
        dataset_from_arrays("x", *parts, classes=["a", "b"])


# --- npz ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_holds_what_was_saved(tmp_path, save):
    held = arrays()
    save(tmp_path / "data.npz", **held)
    data = load_data(f"npz:{tmp_path / 'data.npz'}")
    assert np.array_equal(data.x_train.permute(0, 2, 3, 1).numpy(), held["x_train"])
    assert np.array_equal(data.x_test.permute(0, 2, 3, 1).numpy(), held["x_test"])
    assert data.y_train.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.y_test.tolist() == [0, 1, 2, 0]
    assert data.classes == ("0", "1", "2")


def test_npz_may_name_its_classes(tmp_path):
    assert load_data(npz(tmp_path, classes=np.array(["cat", "dog", "owl"]))).classes == ("cat", "dog", "owl")


def test_npz_needs_no_labels(tmp_path):
    assert load_data(npz(tmp_path, y_train=None, y_test=None)).y_train is None


@pytest.mark.parametrize("key", ["x_train", "x_test"])
def test_npz_without_images_names_what_is_missing(tmp_path, key):
    with pytest.raises(DataError, match=rf"lacks \['{key}'\]; it holds \["):
        load_data(npz(tmp_path, **{key: None}))


BAD_ARRAYS = {
    "flat images": ({"x_train": np.zeros((6, 48), np.uint8)}, r"x_train has shape \(6, 48\); allowed: \(n, h, w\)"),
    "five dimensions": ({"x_test": np.zeros((4, 1, 3, 4, 4), np.uint8)}, "x_test has shape"),
    "five channels": ({"x_train": np.zeros((6, 5, 4, 4), np.uint8)}, "x_train has shape"),
    "no images": ({"x_test": np.zeros((0, 4, 4, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test has shape"),
    "other size": ({"x_test": np.zeros((4, 5, 5, 3), np.uint8)}, r"x_train holds \(3, 4, 4\) .* x_test \(3, 5, 5\)"),
    "floats to 255": ({"x_train": np.full((6, 4, 4, 3), 255.0)}, r"x_train ranges over \[255, 255\] as torch.float64"),
    "normalised": ({"x_test": np.full((4, 4, 4, 3), -1.5)}, r"x_test ranges over \[-1.5, -1.5\]"),
    "negative integers": ({"x_train": np.full((6, 4, 4, 3), -1)}, "x_train ranges over"),
    "integers over 255": ({"x_train": np.full((6, 4, 4, 3), 256)}, "x_train ranges over"),
    "NaN": ({"x_train": np.full((6, 4, 4, 3), np.nan)}, "x_train holds NaN or infinity"),
    "infinity": ({"x_test": np.full((4, 4, 4, 3), np.inf)}, "x_test holds NaN or infinity"),
    "text images": ({"x_train": np.full((6, 4, 4, 3), "a")}, "x_train"),
    "complex images": ({"x_train": np.zeros((6, 4, 4, 3), complex)}, "x_train"),
    "short labels": ({"y_train": np.arange(5)}, r"y_train must be 6 non-negative class indices .* got \(5,\)"),
    "long labels": ({"y_test": np.arange(5)}, r"y_test must be 4 non-negative class indices .* got \(5,\)"),
    "one-hot labels": ({"y_train": np.eye(6, dtype=int)}, r"y_train must be 6 .* got \(6, 6\)"),
    "negative labels": ({"y_train": np.arange(6) - 1}, "y_train must be 6 non-negative"),
    "float labels": ({"y_train": np.arange(6) / 2}, "y_train must be 6 non-negative"),
    "text labels": ({"y_train": np.array(list("abcdef"))}, "y_train must be 6 non-negative"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_npz_with_bad_arrays_names_the_array_and_what_is_allowed(tmp_path, changed, message):
    with pytest.raises(DataError, match=message):
        load_data(npz(tmp_path, **changed))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int32"])
def test_labels_of_every_integer_type_are_taken(tmp_path, dtype):
    data = load_data(npz(tmp_path, y_train=np.arange(6).astype(dtype)))
    assert data.y_train.dtype == torch.int64
    assert data.y_train.tolist() == [0, 1, 2, 3, 4, 5]


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_the_pickle_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["x_train", "y_train", "unused"])
def test_npz_never_runs_a_pickle_inside_it(tmp_path, key):
    spec = npz(tmp_path, **{key: np.array([Evil(tmp_path / "ran")] * 6, dtype=object)})
    with pytest.raises(DataError, match="not a plain npz archive"):
        load_data(spec)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("as_member", [False, True], ids=["bare", "zipped"])
def test_a_pickle_called_npz_never_runs(tmp_path, as_member):
    path, evil = tmp_path / "data.npz", pickle.dumps(Evil(tmp_path / "ran"))
    if as_member:
        with zipfile.ZipFile(path, "w") as archive:
            for key in ("x_train.npy", "x_test.npy"):
                archive.writestr(key, evil)
    else:
        path.write_bytes(evil)
    with pytest.raises(DataError):
        load_data(f"npz:{path}")
    assert not (tmp_path / "ran").exists()


def test_npz_missing_file():
    with pytest.raises(DataError, match=r"no file '/no/such.npz'; npz:PATH needs x_train, y_train, x_test, y_test"):
        load_data("npz:/no/such.npz")


def test_npz_that_is_a_folder(tmp_path):
    with pytest.raises(DataError, match="not a plain npz archive"):
        load_data(f"npz:{tmp_path}")


def test_npz_that_is_a_single_array(tmp_path):
    np.save(tmp_path / "x.npy", arrays()["x_train"])
    with pytest.raises(DataError, match="not a plain npz archive"):
        load_data(f"npz:{tmp_path / 'x.npy'}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.99])
def test_npz_truncated(tmp_path, share):
    npz(tmp_path)
    path = tmp_path / "data.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match="not a plain npz archive"):
        load_data(f"npz:{path}")


@pytest.mark.parametrize("at", [0.1, 0.2, 0.3, 0.4])
def test_npz_damaged_in_the_middle(tmp_path, at):
    path, rng = tmp_path / "data.npz", np.random.default_rng(0)
    x = np.zeros((50, 8, 8), np.uint8)
    x[::3] = rng.integers(0, 9, (17, 8, 8))
    np.savez_compressed(path, x_train=x, x_test=x)
    damaged = bytearray(path.read_bytes())
    for i in range(int(at * len(damaged)), int(at * len(damaged)) + 8):
        damaged[i] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match="not a plain npz archive"):
        load_data(f"npz:{path}")


# --- imagefolder -------------------------------------------------------------------------------------------------


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (10, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def folder(root: Path, test: str = "test") -> Path:
    """Two red cats and a green dog to train on; a blue dog and a red cat to test on."""
    picture(root / "train" / "cat" / "1.png", (255, 0, 0))
    picture(root / "train" / "cat" / "2.png", (204, 0, 0), (6, 12))
    picture(root / "train" / "dog" / "1.png", (0, 255, 0))
    picture(root / test / "dog" / "1.png", (0, 0, 255))
    picture(root / test / "cat" / "1.png", (255, 0, 0))
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_imagefolder_reads_both_splits_in_the_order_of_names(tmp_path, test):
    data = load_data(f"imagefolder:{folder(tmp_path, test)},size=4,normalize=none")
    assert (data.x_train.shape, data.x_train.dtype) == ((3, 3, 4, 4), torch.uint8)
    assert data.classes == ("cat", "dog")
    assert data.y_train.tolist() == [0, 0, 1]
    assert data.y_test.tolist() == [0, 1]
    assert data.x_train[:, :, 2, 2].tolist() == [[255, 0, 0], [204, 0, 0], [0, 255, 0]]
    assert data.x_test[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_imagefolder_is_64_pixels_wide_by_default(tmp_path):
    assert load_data(f"imagefolder:{folder(tmp_path)}").input_shape == (3, 64, 64)


def test_imagefolder_takes_grey_images(tmp_path):
    root = folder(tmp_path)
    Image.new("L", (5, 5), 128).save(root / "train" / "dog" / "2.png")
    assert load_data(f"imagefolder:{root},size=4").x_train[3, :, 0, 0].tolist() == [128, 128, 128]


def test_imagefolder_missing_says_which_folders_it_needs(tmp_path):
    with pytest.raises(DataError, match=r"imagefolder needs .*train/CLASS/\*.png and .*test/CLASS/\*.png"):
        load_data(f"imagefolder:{tmp_path / 'nothing'}")


def test_imagefolder_without_a_test_split_is_an_error(tmp_path):
    picture(tmp_path / "train" / "cat" / "1.png", (1, 2, 3))
    with pytest.raises(DataError, match="imagefolder needs"):
        load_data(f"imagefolder:{tmp_path},size=4")


def test_imagefolder_with_an_empty_class_is_an_error(tmp_path):
    root = folder(tmp_path)
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"imagefolder needs.*empty"):
        load_data(f"imagefolder:{root},size=4")


def test_imagefolder_with_a_damaged_picture_is_an_error(tmp_path):
    root = folder(tmp_path)
    (root / "train" / "dog" / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"imagefolder needs.*2\.png"):
        load_data(f"imagefolder:{root},size=4")


def test_imagefolder_with_different_classes_is_an_error(tmp_path):
    root = folder(tmp_path)
    picture(root / "test" / "owl" / "1.png", (1, 2, 3))
    with pytest.raises(DataError, match=r"hold different classes: \['cat', 'dog'\] and \['cat', 'dog', 'owl'\]"):
        load_data(f"imagefolder:{root},size=4")


@pytest.mark.parametrize("size", ["0", "-3", "big"])
def test_imagefolder_with_an_impossible_size_is_an_error(tmp_path, size):
    with pytest.raises((ConfigError, DataError), match="size"):
        load_data(f"imagefolder:{folder(tmp_path)},size={size}")


# --- CIFAR and SVHN ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "svhn"])
def test_missing_data_point_to_download(tmp_path, kind):
    with pytest.raises(DataError, match=rf"{kind} is not at .*`--download` fetches it there"):
        load_data(f"{kind}:{tmp_path}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "file"),
    [("cifar10", "cifar-10-batches-py/data_batch_1"), ("cifar100", "cifar-100-python/train"),
     ("svhn", "train_32x32.mat")],
)  # fmt: skip
def test_a_file_of_another_checksum_is_refused_and_never_unpickled(tmp_path, kind, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(DataError, match="is damaged"):
        load_data(f"{kind}:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and keeps silent."""

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def cifar_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two images per batch in torchvision's format, served by this machine to itself; image i is filled with i."""
    base = datasets.CIFAR10.base_folder
    files = {"batches.meta": pickled({"label_names": [f"class{i}" for i in range(10)]})}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        values = np.uint8([2 * number, 2 * number + 1])
        files[name] = pickled({"data": np.repeat(values[:, None], 3072, 1), "labels": [number, 9]})
    archive = tmp_path / "served" / "cifar.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{base}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    handler = functools.partial(Quiet, directory=str(archive.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in files if n.startswith("data")])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]})
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield archive
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_fetches_what_then_loads_without_it(tmp_path, cifar_archive):
    spec = f"cifar10:{tmp_path / 'root'}"
    with pytest.raises(DataError, match="--download"):
        load_data(spec)
    data = load_data(spec, download=True)
    assert (data.x_train.shape, data.x_test.shape) == ((10, 3, 32, 32), (2, 3, 32, 32))
    assert data.x_train.dtype == torch.uint8
    assert data.x_train[:, 1, 5, 7].tolist() == list(range(10))
    assert data.y_train.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data.y_test.tolist() == [5, 9]
    assert data.classes == tuple(f"class{i}" for i in range(10))
    assert data.flip
    cifar_archive.unlink()
    assert load_data(spec).fingerprint() == data.fingerprint()


def test_download_that_fails_is_a_download_error(tmp_path, cifar_archive):
    cifar_archive.unlink()
    with pytest.raises(DownloadError, match="could not fetch cifar10 into"):
        load_data(f"cifar10:{tmp_path / 'root'}", download=True)


def test_download_of_another_checksum_is_a_download_error(tmp_path, cifar_archive):
    cifar_archive.write_bytes(b"an error page")
    with pytest.raises(DownloadError, match="could not fetch cifar10 into"):
        load_data(f"cifar10:{tmp_path / 'root'}", download=True)


# --- anybody's factory -------------------------------------------------------------------------------------------


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_data.py").write_text(
        "import numpy as np\n"
        "from layerlens.data import dataset_from_arrays\n"
        "def parts(n=4):\n    x = np.zeros((n, 2, 2), np.uint8)\n    return x, np.arange(n), x, np.arange(n)\n"
        "def mapping():\n    return dict(zip(('x_train', 'y_train', 'x_test', 'y_test'), parts()))\n"
        "def unlabelled():\n    return {'x_train': parts()[0], 'x_test': parts()[2]}\n"
        "def dataset(n=4):\n    return dataset_from_arrays('mine', *parts(n), flip=False)\n"
        "def three():\n    return parts()[:3]\n"
        "def nothing():\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_data"


@pytest.mark.parametrize("name", ["parts", "mapping", "dataset"])
def test_a_factory_may_return_a_tuple_a_dict_or_a_dataset(factories, name):
    data = load_data(f"{factories}:{name}")
    assert data.input_shape == (1, 2, 2)
    assert data.y_test.tolist() == [0, 1, 2, 3]


def test_a_factory_takes_options_and_normalize(factories):
    data = load_data(f"{factories}:dataset,n=6,normalize=none")
    assert len(data.x_train) == 6
    assert (data.mean, data.std, data.flip) == ((0.0,), (1.0,), False)


def test_a_factory_may_leave_labels_out(factories):
    assert load_data(f"{factories}:unlabelled").y_train is None


@pytest.mark.parametrize("name", ["three", "nothing"])
def test_a_factory_that_returns_something_else_is_an_error(factories, name):
    with pytest.raises(DataError, match=rf"my_data:{name} must return a Dataset, a dict or a tuple"):
        load_data(f"{factories}:{name}")


def test_a_factory_that_is_not_there_is_an_error(factories):
    with pytest.raises(UnknownNameError, match="my_data has no callable 'datset'; closest: dataset"):
        load_data(f"{factories}:datset")


# --- fingerprint -------------------------------------------------------------------------------------------------


def made(**changed: object) -> Dataset:
    held = arrays(**changed)
    return dataset_from_arrays("x", *(held.get(key) for key in ("x_train", "y_train", "x_test", "y_test")))


def one_changed(key: str) -> Dataset:
    values = arrays()[key].copy()
    values.flat[-1] = (int(values.flat[-1]) + 1) % 3
    return made(**{key: values})


SQUARE = np.arange(96, dtype=np.uint8).reshape(6, 4, 4)

DIFFERENT: dict[str, tuple[Dataset, Dataset]] = {
    **{f"one number of {key}": (made(), one_changed(key)) for key in ("x_train", "y_train", "x_test", "y_test")},
    "mean": (made(), replace(made(), mean=(0.1,) * 3)),
    "std": (made(), replace(made(), std=(0.5,) * 3)),
    "flip": (made(), replace(made(), flip=False)),
    "no labels": (made(), made(y_train=None, y_test=None)),
    "splits swapped": (
        made(),
        dataset_from_arrays("x", *(arrays()[k] for k in ("x_test", "y_test", "x_train", "y_train"))),
    ),
    "order of samples": (
        made(y_train=None, y_test=None),
        made(x_train=arrays()["x_train"][::-1].copy(), y_train=None, y_test=None),
    ),
    "shape of an image": (
        dataset_from_arrays("x", SQUARE, None, SQUARE, None),
        dataset_from_arrays("x", SQUARE.reshape(6, 2, 8), None, SQUARE.reshape(6, 2, 8), None),
    ),
    "place of the split": (
        dataset_from_arrays("x", SQUARE[:4], None, SQUARE[4:], None),
        dataset_from_arrays("x", SQUARE[:3], None, SQUARE[3:], None),
    ),
}


@pytest.mark.parametrize(("left", "right"), DIFFERENT.values(), ids=DIFFERENT)
def test_fingerprint_changes_with(left, right):
    assert left.fingerprint() != right.fingerprint()


def test_fingerprint_ignores_the_name_and_is_a_sha256():
    assert replace(made(), name="other").fingerprint() == made().fingerprint()
    assert len(bytes.fromhex(made().fingerprint())) == 32


# --- batches -----------------------------------------------------------------------------------------------------


def labels_of(batches: object) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(101, 100, [51, 50]), (100, 100, [100]), (10, 4, [5, 5]), (3, 100, [3]), (8, 4, [4, 4]), (5, 1, [1] * 5)],
)
def test_batches_are_of_equal_size_but_for_one(count, batch_size, sizes):
    batches = numbered(count).batches(batch_size=batch_size)
    assert [len(images) for images, _ in batches] == sizes
    assert len(batches) == len(sizes)


def test_no_batch_is_too_small_for_an_unbiased_estimate():
    assert min(map(len, labels_of(numbered(101).batches(batch_size=100)))) >= 4


def test_batches_hold_every_sample_once_with_its_label():
    data = numbered(11)
    seen = [(round(image.item() * 11), label) for images, labels in data.batches(batch_size=4)
            for image, label in zip(images, labels.tolist(), strict=True)]  # fmt: skip
    assert all(number == label for number, label in seen)
    assert sorted(label for _, label in seen) == list(range(11))


def test_batches_come_in_the_same_order_at_every_iteration():
    batches = numbered(20).batches(batch_size=6)
    assert labels_of(batches) == labels_of(batches)


def test_batches_are_random_by_seed_alone():
    first = labels_of(numbered(50).batches(seed=0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert labels_of(numbered(50).batches(seed=0)) == first
        assert torch.equal(torch.get_rng_state(), before)
    assert labels_of(numbered(50).batches(seed=1)) != first
    assert first != [list(range(50))]


def test_the_batch_size_does_not_change_the_order():
    def flat(batch_size: int) -> list[int]:
        return [label for batch in labels_of(numbered(20).batches(batch_size=batch_size)) for label in batch]

    assert flat(3) == flat(20)


def test_samples_choose_the_first_of_the_same_order():
    whole = labels_of(numbered(20).batches())[0]
    assert labels_of(numbered(20).batches(samples=7)) == [whole[:7]]
    assert labels_of(numbered(20).batches(samples=99)) == [whole]


def test_batches_are_normalised():
    data = replace(numbered(4), mean=(0.5,), std=(0.25,))
    ((images, labels),) = data.batches()
    assert images.flatten().tolist() == [(label / 4 - 0.5) / 0.25 for label in labels.tolist()]


def test_batches_take_the_split_asked_for():
    data = made()
    assert sum(map(len, labels_of(data.batches("train")))) == 6
    assert sum(map(len, labels_of(data.batches()))) == 4


def test_batches_without_labels_yield_none():
    ((_, labels),) = made(y_train=None, y_test=None).batches()
    assert labels is None


def test_classes_keeps_the_images_of_these_classes_and_counts_from_zero():
    whole, part = load_data("digits"), load_data("digits,classes=5-9")
    chosen = whole.y_test >= 5
    assert torch.equal(part.x_test, whole.x_test[chosen])
    assert torch.equal(part.y_test, whole.y_test[chosen] - 5)
    assert part.classes == ("5", "6", "7", "8", "9")
    assert len(part.x_train) + len(load_data("digits,classes=0-4").x_train) == len(whole.x_train)
    assert part.mean != whole.mean  # the statistics are those of the images that are left


@pytest.mark.parametrize("span", ["4-2", "0-10", "3", "a-b", "-1-3"])
def test_classes_that_are_not_there_are_an_error(span):
    with pytest.raises(DataError, match=rf"classes={span} of digits.*allowed: first-last, such as 0-4, among its 10"):
        load_data(f"digits,classes={span}")


def test_classes_without_labels_are_an_error(tmp_path):
    x = np.zeros((4, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x)
    with pytest.raises(DataError, match="allowed: first-last"):
        load_data(f"npz:{tmp_path / 'x.npz'},classes=0-1")
