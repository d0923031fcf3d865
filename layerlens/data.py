"""Data sets by name, held as one tensor per split: uint8 or float images, ready to sit on a device."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from layerlens.batch_sizes import even_batches, fixed_choice
from layerlens.errors import DataError, DownloadError, UnknownNameError, closest
from layerlens.graph_batches import is_graph_object
from layerlens.graphs import GRAPH_SOURCES, GraphDataset, dataset_from_graphs, load_graphs
from layerlens.specs import Spec, call_factory, is_factory, parse_spec
from layerlens.text import TEXT_SOURCES, TextDataset, load_text

SPLITS = ("train", "test")
_COMMON = ("normalize", "classes")  # options of every data set, but of factories only the first
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images and labels of a train and a test split.

    Attributes:
        name: The specification that made it.
        x_train, x_test: Images, shape (n, channels, height, width); uint8 in [0, 255] or float32 in [0, 1].
        y_train, y_test: Class indices, shape (n,), int64; None where there are no labels.
        classes: Class names; empty without labels.
        mean, std: Per channel, on the [0, 1] scale; what `normalize` subtracts and divides by.
        flip: Whether a mirrored image is still a valid one (not for digits).
    """

    name: str
    x_train: Tensor
    x_test: Tensor
    y_train: Tensor | None
    y_test: Tensor | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True

    def __len__(self) -> int:
        """Images of the training split."""
        return len(self.x_train)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return cast("tuple[int, int, int]", tuple(self.x_train.shape[1:]))

    def fingerprint(self) -> str:
        """SHA-256 over images, labels and normalisation, as hexadecimal digits; made once, as these never change."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = (self.x_train, self.y_train, self.x_test, self.y_test)
        shapes = [None if part is None else (str(part.dtype), tuple(part.shape)) for part in parts]
        digest = hashlib.sha256(repr((self.mean, self.std, self.flip, shapes)).encode())
        for part in parts:
            digest.update(b"" if part is None else part.contiguous().numpy().data)
        return digest.hexdigest()

    def split(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Images and labels of `train` or `test`."""
        if name not in SPLITS:
            raise UnknownNameError(f"no split {name!r}; allowed: {', '.join(SPLITS)}")
        return (self.x_train, self.y_train) if name == "train" else (self.x_test, self.y_test)

    def normalize(self, images: Tensor) -> Tensor:
        """Images of any split as the network sees them: float32, zero mean and unit deviation per channel."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (to_unit(images) - mean) / std

    def batches(
        self, split: str = "test", *, samples: int | None = None, batch_size: int = 100, seed: int = 0
    ) -> Batches:
        """A fixed random choice of `samples` images of a split, normalised, the same at every iteration."""
        images, labels = self.split(split)
        return Batches(self, images, labels, fixed_choice(len(images), samples, seed), batch_size)

    def in_order(self, split: str, batch_size: int = 512) -> Batches:
        """All images of a split, normalised, in their own order."""
        images, labels = self.split(split)
        return Batches(self, images, labels, torch.arange(len(images)), batch_size)


AnyDataset = Dataset | TextDataset | GraphDataset


class Batches:
    """An iterable of (images, labels), normalised, in an order that never changes.

    The batches are of equal size but for one sample, so that none is too short for a statistic.
    """

    def __init__(self, dataset: Dataset, images: Tensor, labels: Tensor | None, order: Tensor, batch_size: int) -> None:
        self.dataset, self.images, self.labels, self.order = dataset, images, labels, order
        self.batch_size = batch_size

    def __len__(self) -> int:
        return even_batches(len(self.order), self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for rows in self.order.tensor_split(len(self)):
            labels = None if self.labels is None else self.labels[rows]
            yield self.dataset.normalize(self.images[rows]), labels


def to_unit(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1], whatever they are stored as."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def load_data(spec: str, *, download: bool = False) -> AnyDataset:
    """Load a data set by its specification.

    Args:
        spec: `digits`, `cifar10:ROOT`, `cifar100:ROOT`, `svhn:ROOT`, `imagefolder:PATH`, `npz:PATH` or
            `pkg.module:factory`; `,normalize=imagenet` or `,normalize=none` replaces the statistics of the
            training split, and `,classes=0-4` keeps the images of these classes alone. For sentences, `text:PATH`,
            `pairs:PATH` or `sts:PATH`, see `text.load_text`; for graphs `tu:NAME@ROOT` or `graphs-npz:PATH`, see
            `graphs.load_graphs`.
        download: Let torchvision fetch a missing CIFAR or SVHN, or torch_geometric a missing TU data set.

    Raises:
        UnknownNameError: No such kind of data.
        DataError: The data are missing or damaged, or of the wrong shape or range.
    """
    parsed = parse_spec(spec)
    if parsed.kind in TEXT_SOURCES:
        return load_text(parsed)
    if parsed.kind in GRAPH_SOURCES:
        return load_graphs(parsed, download=download)
    if parsed.kind in SOURCES:
        read, options = SOURCES[parsed.kind]
        parsed.check_options({*options, *_COMMON})
        made = read(parsed, download)
    elif is_factory(parsed):
        found = _from_factory(parsed)
        if isinstance(found, GraphDataset):
            return found
        made = found
    else:
        known = [*SOURCES, *TEXT_SOURCES, *GRAPH_SOURCES]
        raise UnknownNameError(f"unknown data {spec!r}; {closest(parsed.kind, known)}, or pkg.module:factory")
    if "classes" in parsed.options and parsed.kind in SOURCES:  # a factory has options of its own
        made = _of_classes(made, str(parsed.options["classes"]))
    return _with_statistics(made, parsed.options.get("normalize"))


def dataset_from_arrays(
    name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any, *, classes: Any = None, flip: bool = True
) -> Dataset:
    """Check arrays or tensors and make a `Dataset` of them.

    Args:
        name: What errors and results call it.
        x_train, x_test: Images (n, h, w), (n, h, w, c) or (n, c, h, w), c = 1 or 3; uint8 or float in [0, 1].
        y_train, y_test: Class indices (n,), or None.
        classes: Class names, by index.
        flip: Whether mirrored images are valid.

    Raises:
        DataError: A shape, type or range that is not allowed; it names the array.
    """
    train, test = _images(f"{name}: x_train", x_train), _images(f"{name}: x_test", x_test)
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{name}: x_train holds {tuple(train.shape[1:])} images, x_test {tuple(test.shape[1:])}")
    labels = [
        _labels(f"{name}: {key}", y, len(x)) for key, y, x in (("y_train", y_train, train), ("y_test", y_test, test))
    ]
    known = [y.max().item() for y in labels if y is not None]
    if known and max(known) >= len(train) + len(test):
        raise DataError(f"{name}: label {int(max(known))} with {len(train) + len(test)} images; classes count from 0")
    names = (
        tuple(str(c) for c in classes)
        if classes is not None
        else tuple(map(str, range(int(max(known, default=-1)) + 1)))
    )
    if known and max(known) >= len(names):
        raise DataError(f"{name}: label {int(max(known))} but only {len(names)} class names")
    return Dataset(
        name=name, x_train=train, y_train=labels[0], x_test=test, y_test=labels[1], classes=names,
        mean=(0.0,) * train.shape[1], std=(1.0,) * train.shape[1], flip=flip,
    )  # fmt: skip


def _of_classes(data: Dataset, span: str) -> Dataset:
    """The images of the classes `first-last`, counted from 0; the labels begin at 0 again."""
    count = len(data.classes)
    first, dash, last = span.partition("-")
    fine = dash and first.isdigit() and last.isdigit() and int(first) <= int(last) < count
    if not fine or data.y_train is None or data.y_test is None:
        raise DataError(f"classes={span} of {data.name}; allowed: first-last, such as 0-4, among its {count} classes")
    low, high = int(first), int(last)
    kept = [(y >= low) & (y <= high) for y in (data.y_train, data.y_test)]
    if not all(part.any() for part in kept):
        raise DataError(f"classes={span} of {data.name}: no image of these classes in one of its splits")
    return replace(
        data, x_train=data.x_train[kept[0]], x_test=data.x_test[kept[1]], y_train=data.y_train[kept[0]] - low,
        y_test=data.y_test[kept[1]] - low, classes=data.classes[low : high + 1],
    )  # fmt: skip


def _with_statistics(data: Dataset, normalize: str | None) -> Dataset:
    if normalize == "none":
        return data
    if normalize == "imagenet":
        if data.input_shape[0] != 3:
            raise DataError(f"normalize=imagenet needs 3 channels; {data.name} has {data.input_shape[0]}")
        return replace(data, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if normalize is not None:
        raise DataError(f"normalize={normalize!r} is unknown; allowed: imagenet, none, or nothing for the data's own")
    sums = torch.zeros(2, data.input_shape[0], dtype=torch.float64)
    for chunk in data.x_train.split(1000):
        unit = to_unit(chunk).double()
        sums += torch.stack([unit.sum(dim=(0, 2, 3)), unit.square().sum(dim=(0, 2, 3))])
    first, second = sums / (data.x_train.numel() / data.input_shape[0])
    std = (second - first.square()).clamp_min(0).sqrt()
    return replace(
        data, mean=tuple(round(v, 6) for v in first.tolist()), std=tuple(round(v, 6) or 1.0 for v in std.tolist())
    )


def _images(label: str, values: Any) -> Tensor:
    array = _array(values)
    if array.dtype.kind not in "uif":
        raise DataError(f"{label} holds {array.dtype}; allowed: integers or floats")
    wide = array.dtype.kind in "iu" and array.dtype.itemsize > 1
    x = torch.from_numpy(array.astype(np.int64 if wide else array.dtype.newbyteorder("="), order="C"))
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise DataError(
            f"{label} has shape {tuple(x.shape)}; allowed: (n, h, w), (n, h, w, c) or (n, c, h, w), c = 1 or 3"
        )
    x = x.contiguous()
    if x.dtype == torch.uint8:
        return x
    if x.is_floating_point() and not x.isfinite().all():
        raise DataError(f"{label} holds NaN or infinity; remove or repair those images")
    low, high = x.min().item(), x.max().item()
    if not x.is_floating_point() and low >= 0 and high <= 255:
        return x.to(torch.uint8)
    if x.is_floating_point() and low >= 0 and high <= 1:
        return x.float()
    raise DataError(f"{label} ranges over [{low:g}, {high:g}] as {x.dtype}; allowed: uint8 0 to 255, or float 0 to 1")


def _labels(label: str, values: Any, count: int) -> Tensor | None:
    if values is None:
        return None
    array = _array(values)
    if array.shape != (count,) or array.dtype.kind not in "iu" or (count and array.min() < 0):
        wanted = f"{count} non-negative class indices of shape ({count},)"
        raise DataError(f"{label} must be {wanted}; got {array.shape} {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _array(values: Any) -> np.ndarray[Any, Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _digits(spec: Spec, download: bool) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(images, bunch.target, test_size=360, random_state=0, stratify=bunch.target)
    x_train, x_test, y_train, y_test = parts
    return dataset_from_arrays(spec.text, x_train, y_train, x_test, y_test, classes=range(10), flip=False)


def _cifar(spec: Spec, download: bool) -> Dataset:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[spec.kind]
    train, test = (_torchvision(spec, download, kind, train=flag) for flag in (True, False))
    return dataset_from_arrays(spec.text, train.data, train.targets, test.data, test.targets, classes=train.classes)


def _svhn(spec: Spec, download: bool) -> Dataset:
    from torchvision import datasets

    train, test = (_torchvision(spec, download, datasets.SVHN, split=name) for name in ("train", "test"))
    return dataset_from_arrays(
        spec.text, train.data, train.labels, test.data, test.labels, classes=range(10), flip=False
    )


def _torchvision(spec: Spec, download: bool, kind: Callable[..., Any], **split: Any) -> Any:
    root = spec.argument or "."
    try:
        return kind(root, download=download, **split)
    except RuntimeError as error:  # torchvision compares checksums before it reads, so nothing unknown is unpickled
        if download:
            raise DownloadError(f"could not fetch {spec.kind} into {root!r}: {error}") from error
        raise DataError(
            f"{spec.kind} is not at {root!r} or is damaged; `--download` fetches it there, "
            f"or copy torchvision's own folder for {spec.kind} to it"
        ) from error
    except OSError as error:
        raise DownloadError(f"could not fetch {spec.kind} into {root!r}: {error}") from error


def _imagefolder(spec: Spec, download: bool) -> Dataset:
    from torchvision import datasets, transforms

    root, size = Path(spec.argument), spec.options.get("size", 64)
    if not isinstance(size, int) or size < 1:
        raise DataError(f"imagefolder with size={size!r}; allowed: pixels, a whole number from 1")
    test_name = "test" if (root / "test").is_dir() else "val"
    fit = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    classes: list[str] = []
    for split in ("train", test_name):
        try:
            folder = datasets.ImageFolder(str(root / split), transform=fit)
            loaded = [folder[i] for i in range(len(folder))]
        except (OSError, ValueError) as error:
            raise DataError(
                f"imagefolder needs {root}/train/CLASS/*.png and {root}/test/CLASS/*.png (or val): {error}"
            ) from error
        if classes and folder.classes != classes:
            raise DataError(
                f"{root}/train and {root}/{test_name} hold different classes: {classes} and {folder.classes}"
            )
        classes = folder.classes
        parts[split] = torch.stack([image for image, _ in loaded]), torch.tensor([label for _, label in loaded])
    return dataset_from_arrays(spec.text, *parts["train"], *parts[test_name], classes=classes)


def _npz(spec: Spec, download: bool) -> Dataset:
    try:
        with open(spec.argument, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"no file {spec.argument!r}; npz:PATH needs x_train, y_train, x_test, y_test") from error
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{spec.argument!r} is not a plain npz archive of arrays: {error}") from error
    missing = [key for key in ("x_train", "x_test") if key not in arrays]
    if missing:
        raise DataError(
            f"{spec.argument!r} lacks {missing}; it holds {sorted(arrays)}; y_train and y_test are optional"
        )
    return dataset_from_arrays(
        spec.text, arrays["x_train"], arrays.get("y_train"), arrays["x_test"], arrays.get("y_test"),
        classes=arrays.get("classes"),
    )  # fmt: skip


def _from_factory(spec: Spec) -> Dataset | GraphDataset:
    options = {key: value for key, value in spec.options.items() if key != "normalize"}
    made = call_factory(spec, options, SOURCES)
    if isinstance(made, Dataset | GraphDataset):
        return made
    if isinstance(made, list | tuple) and made and all(is_graph_object(graph) for graph in made):
        return dataset_from_graphs(spec.text, made)
    if isinstance(made, dict):
        made = tuple(made.get(key) for key in ("x_train", "y_train", "x_test", "y_test"))
    if not isinstance(made, tuple) or len(made) != 4:
        raise DataError(
            f"{spec.text} must return a Dataset, a dict or a tuple (x_train, y_train, x_test, y_test), or a list of "
            "graphs"
        )
    return dataset_from_arrays(spec.text, *made)


SOURCES: dict[str, tuple[Callable[[Spec, bool], Dataset], tuple[str, ...]]] = {
    "digits": (_digits, ()),
    "cifar10": (_cifar, ()),
    "cifar100": (_cifar, ()),
    "svhn": (_svhn, ()),
    "imagefolder": (_imagefolder, ("size",)),
    "npz": (_npz, ()),
}
