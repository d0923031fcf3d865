"""The frozen result types; each leaves as a frame or as JSON and comes back from JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from layerlens.errors import DataError, ShapeError, UnknownLayerError, closest

SCHEMA = 1
Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
R = TypeVar("R", bound="Result")


@dataclass(frozen=True, kw_only=True)
class Caution:
    """Something that a reader of a result should know.

    Attributes:
        code: Stable, such as LL003; the docs list them all.
        text: One sentence with the numbers in it.
        layers: The layers it is about; empty for the whole result.
    """

    code: str
    text: str
    layers: tuple[str, ...] = ()


class Result:
    """JSON in both directions for the frozen result types; NaN travels as null."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        content = _plain(asdict(self))  # type: ignore[call-overload]
        return {"type": type(self).__name__, "schema": SCHEMA, **content}

    def to_json(self, **options: Any) -> str:
        """The result as JSON text with its type and schema version; no NaN."""
        return json.dumps(self.to_dict(), allow_nan=False, **options)

    @classmethod
    def from_dict(cls: type[R], content: dict[str, Any]) -> R:
        """A result from what `to_dict` made.

        Raises:
            DataError: Another type, a newer schema, or fields that do not fit.
        """
        if not isinstance(content, dict) or content.get("type") != cls.__name__:
            found = content.get("type") if isinstance(content, dict) else type(content).__name__
            raise DataError(f"this JSON holds {found!r}, not a {cls.__name__}")
        if content.get("schema") != SCHEMA:
            raise DataError(
                f"{cls.__name__} has schema {content.get('schema')!r}; this layerlens reads {SCHEMA}: update it"
            )
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        try:
            return cls(**{key: value for key, value in content.items() if key in names})
        except (TypeError, ValueError) as error:
            raise DataError(f"this {cls.__name__} is damaged: {error}") from error

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """A result from its JSON text; errors as in `from_dict`."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise DataError(f"this is not JSON: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PermutationNull(Result):
    """What unrelated representations of the same sizes would score: the samples of one side paired at random.

    Attributes:
        permutations: How many.
        mean: Shape (R, C): mean score of a wrong pairing.
        bound: Shape (R, C): the score that `level` of the wrong pairings do not reach (that they exceed, for a
            distance).
        p_value: Shape (R, C): (1 + wrong pairings at least as alike as the right one) / (1 + permutations).
        level: Of the bound.
    """

    permutations: int
    mean: Array
    bound: Array
    p_value: Array
    level: float = 0.95

    def __post_init__(self) -> None:
        for name in ("mean", "bound", "p_value"):
            _freeze(self, name)
        if not self.mean.shape == self.bound.shape == self.p_value.shape:
            raise ShapeError(f"a null of shapes {self.mean.shape}, {self.bound.shape} and {self.p_value.shape}")


@dataclass(frozen=True, kw_only=True)
class _Similarity(Result):
    """What matrices of one model and of two have in common; see `SimilarityMatrix`."""

    values: Array
    low: Array
    high: Array
    level: float = 0.95
    measure: str = "cka"
    options: dict[str, Any] = field(default_factory=dict)
    reduce: str = "flatten"
    samples: int
    sample_id: str = ""
    precision_error: float = float("nan")
    null: PermutationNull | None = None
    weights: Array = field(repr=False)
    replicates: Array = field(repr=False, default_factory=lambda: np.zeros((0, 0, 0)))
    cautions: tuple[Caution, ...] = ()

    def _check(self, rows: int, columns: int, **more: tuple[int, ...]) -> None:
        shape = (rows, columns)
        if not len(self.replicates):
            object.__setattr__(self, "replicates", np.zeros((0, *shape)))
        groups = len(self.weights)
        shapes = {"values": shape, "low": shape, "high": shape, "weights": (groups,), **more}
        shapes["replicates"] = (len(self.replicates), *shape)
        for name, wanted in shapes.items():
            _freeze(self, name)
            found = getattr(self, name).shape
            if found != wanted:
                raise ShapeError(f"{name} has shape {found}; {rows} × {columns} layers need {wanted}")
        if self.precision_error is None:
            object.__setattr__(self, "precision_error", float("nan"))
        if isinstance(self.null, dict):
            object.__setattr__(self, "null", PermutationNull(**_without_stamp(self.null)))
        if self.null is not None and self.null.mean.shape != shape:
            raise ShapeError(f"a null of shape {self.null.mean.shape} for {rows} × {columns} layers")
        object.__setattr__(self, "cautions", restore_cautions(self.cautions))

    @property
    def rows(self) -> tuple[str, ...]:
        """Names along the first axis."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """Names along the second axis."""
        raise NotImplementedError

    def between(self, first: str, second: str) -> float:
        """The similarity of two layers by name, row first.

        Raises:
            UnknownLayerError: A name that is not in the matrix.
        """
        return float(self.values[self.place(first, second)])

    def place(self, first: str, second: str) -> tuple[int, int]:
        """Row and column of two layers by name; errors as `between`."""
        return _place(first, self.rows), _place(second, self.columns)

    def leave_out(self) -> Array:
        """The values without each group of samples in turn, shape (G, R, C); empty where nothing was kept."""
        return self.replicates

    def to_frame(self) -> Any:
        """One row per pair of layers: layer_a, layer_b, value, low, high, measure, null_bound, p_value."""
        import pandas as pd

        null = {} if self.null is None else {"null_bound": self.null.bound, "p_value": self.null.p_value}
        return pd.DataFrame(
            {
                "layer_a": np.repeat(self.rows, len(self.columns)), "layer_b": np.tile(self.columns, len(self.rows)),
                "value": self.values.ravel(), "low": self.low.ravel(), "high": self.high.ravel(),
                "measure": self.measure, **{name: array.ravel() for name, array in null.items()},
            }
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SimilarityMatrix(_Similarity):
    """Similarity of all pairs of L layers on the same samples.

    Attributes:
        layers: Names, in execution order.
        values: Shape (L, L), symmetric; NaN where a layer is constant, so that there is no similarity.
        low, high: Ends of the confidence interval of each entry; NaN where there is none.
        level: Confidence of the intervals, in (0, 1).
        measure: What was measured, such as `cka`; `measures.MEASURES` has its range and direction.
        options: Of the measure, such as kernel and estimator of CKA.
        reduce: How maps became rows: `flatten`, `pool` or `positions`, see `reduction.Reduction`.
        samples: Rows compared: samples, or their positions.
        sample_id: Digest of the batches that were seen; two matrices with the same one saw the same samples in
            the same order. Empty if unknown.
        precision_error: Largest difference that float64 made in the entries on a part of the first batch; NaN if
            that was not checked.
        null: What unrelated representations score, where it was asked for.
        participation: Shape (L,): how many directions carry each layer's variance, (Σλ)² / Σλ², at least 1;
            averaged over batches where there are several.
        blocks: Shape (B, L, L): HSIC sums of B groups of batches or samples, for resampling; none but for CKA.
        weights: Shape (B,) or (G,): samples in each group.
        replicates: Shape (G, L, L): values without each of G groups of samples; none for CKA, whose blocks tell.
        cautions: What to know about it.
    """

    layers: tuple[str, ...]
    participation: Array
    blocks: Array = field(repr=False, default_factory=lambda: np.zeros((0, 0, 0)))

    def __post_init__(self) -> None:
        count = len(self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        if not len(self.blocks):
            object.__setattr__(self, "blocks", np.zeros((0, count, count)))
        self._check(count, count, participation=(count,), blocks=(len(self.blocks), count, count))
        groups = len(self.blocks) or len(self.replicates)
        if groups != len(self.weights) and groups:
            raise ShapeError(f"weights has shape {self.weights.shape}; {groups} groups need ({groups},)")

    @property
    def rows(self) -> tuple[str, ...]:
        """The layers."""
        return self.layers

    @property
    def columns(self) -> tuple[str, ...]:
        """The layers."""
        return self.layers

    @property
    def kernel(self) -> str:
        """`linear` or `rbf`; `linear` for measures other than CKA."""
        return str(self.options.get("kernel", "linear"))

    @property
    def estimator(self) -> str:
        """`minibatch`, `debiased` or `biased` for CKA; otherwise `whole-set`."""
        return str(self.options.get("estimator", "minibatch" if self.measure == "cka" else "whole-set"))

    @property
    def missing(self) -> tuple[str, ...]:
        """Layers without a similarity, because they are constant over the samples."""
        return tuple(name for name, value in zip(self.layers, self.values.diagonal(), strict=True) if np.isnan(value))

    def leave_out(self) -> Array:
        """The values without each group of samples in turn, shape (G, L, L); empty where nothing was kept."""
        if len(self.blocks) < 2:
            return self.replicates
        from layerlens.analysis.resampling import leave_one_out

        return leave_one_out(self.blocks, self.weights)


@dataclass(frozen=True, kw_only=True)
class CrossSimilarity(_Similarity):
    """Similarity of each layer of one model to each layer of another, on the same samples.

    Attributes:
        first, second: Names of the layers of the two models, in execution order: rows and columns.
        labels: What the two models are called.
        values: Shape (R, C); NaN where a layer is constant.
        replicates: Shape (G, R, C): values without each of G groups of samples; weights: samples in each group.
        level, measure, options, reduce, samples, sample_id, precision_error, null, low, high, cautions: As for
            `SimilarityMatrix`.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    labels: tuple[str, str] = ("A", "B")

    def __post_init__(self) -> None:
        for name in ("first", "second", "labels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check(len(self.first), len(self.second))

    @property
    def rows(self) -> tuple[str, ...]:
        """Layers of the first model."""
        return self.first

    @property
    def columns(self) -> tuple[str, ...]:
        """Layers of the second model."""
        return self.second

    @property
    def missing(self) -> tuple[str, ...]:
        """Layers without a similarity to any layer of the other model, the model's label in front."""
        empty = np.isnan(self.values)
        lost = [f"{self.labels[0]}:{name}" for i, name in enumerate(self.first) if empty[i].all()]
        return tuple(lost + [f"{self.labels[1]}:{name}" for j, name in enumerate(self.second) if empty[:, j].all()])

    def counterparts(self) -> dict[str, str]:
        """For each layer of the first model the layer of the second that is most alike."""
        from layerlens.analysis.measures import MEASURES

        sign = 1.0 if MEASURES[self.measure].higher_is_alike else -1.0
        best = np.where(np.isnan(self.values), -np.inf, sign * self.values).argmax(1)
        return {
            name: self.second[k]
            for name, k, row in zip(self.first, best, self.values, strict=True)
            if not np.isnan(row).all()
        }


@dataclass(frozen=True, kw_only=True)
class SampleInfluence(Result):
    """How much single samples move the entries of a similarity matrix: each is left out in turn, exactly.

    Attributes:
        layers: Names.
        samples: How many.
        largest: Shape (n,): the largest absolute change that leaving the sample out makes in any entry.
        z_score: Shape (n,): the same in units of its spread over samples (median absolute deviation).
        index: Shape (L, L, k): samples (by place in the loader) with the largest influence on each entry.
        change: Shape (L, L, k): what leaving each of these out adds to the entry.
    """

    layers: tuple[str, ...]
    samples: int
    largest: Array
    z_score: Array
    index: npt.NDArray[np.int64]
    change: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("largest", "z_score", "change"):
            _freeze(self, name)
        index = np.array(self.index, dtype=np.int64)
        index.setflags(write=False)
        object.__setattr__(self, "index", index)
        if len(self.largest) != self.samples or self.index.shape != self.change.shape:
            raise ShapeError(f"{self.samples} samples, but influence of {len(self.largest)}")

    def outliers(self, threshold: float = 8.0) -> tuple[int, ...]:
        """Samples whose influence stands out by more than `threshold` spreads, strongest first."""
        order = np.argsort(-self.z_score, kind="stable")
        return tuple(int(i) for i in order if self.z_score[i] > threshold)

    def to_frame(self) -> Any:
        """One row per sample: sample, largest, z_score (a pandas DataFrame)."""
        import pandas as pd

        return pd.DataFrame({"sample": np.arange(self.samples), "largest": self.largest, "z_score": self.z_score})


@dataclass(frozen=True, kw_only=True)
class Difference(Result):
    """Whether entries of two matrices differ, or two entries of one.

    Attributes:
        rows, columns: Names along both axes.
        values: Shape (R, C): second minus first.
        low, high: Ends of the confidence interval of each difference.
        p_value: Shape (R, C): two-sided; of each entry by itself.
        adjusted: Shape (R, C): by Holm's method over all distinct entries.
        paired: Whether both saw the same samples, so that what the samples share cancels.
        level: Confidence of the intervals.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array
    low: Array
    high: Array
    p_value: Array
    adjusted: Array
    paired: bool
    level: float = 0.95

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("values", "low", "high", "p_value", "adjusted"):
            _freeze(self, name)
            if getattr(self, name).shape != (len(self.rows), len(self.columns)):
                raise ShapeError(f"{name} has shape {getattr(self, name).shape} for {self.rows} and {self.columns}")

    def to_frame(self) -> Any:
        """One row per entry (a pandas DataFrame)."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer_a": np.repeat(self.rows, len(self.columns)), "layer_b": np.tile(self.columns, len(self.rows)),
                **{name: getattr(self, name).ravel() for name in ("values", "low", "high", "p_value", "adjusted")},
            }
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FilmStrip(Result):
    """The similarity matrices of a run's checkpoints, first to last, on the same samples.

    Attributes:
        labels: Of the frames, such as `epoch 10`.
        frames: One matrix per checkpoint, all over the same layers.
        changes: From each frame to the next; one less than frames.
    """

    labels: tuple[str, ...]
    frames: tuple[SimilarityMatrix, ...]
    changes: tuple[Difference, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        kinds = {"frames": SimilarityMatrix, "changes": Difference}
        for name, kind in kinds.items():
            items = [kind(**_without_stamp(i)) if isinstance(i, dict) else i for i in getattr(self, name)]
            object.__setattr__(self, name, tuple(items))
        if len(self.labels) != len(self.frames) or len({frame.layers for frame in self.frames}) > 1:
            raise ShapeError(f"{len(self.labels)} labels for {len(self.frames)} frames, all over the same layers")

    def to_frame(self) -> Any:
        """All matrices in long form with a column `checkpoint` (a pandas DataFrame)."""
        import pandas as pd

        parts = [m.to_frame().assign(checkpoint=label) for label, m in zip(self.labels, self.frames, strict=True)]
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True, kw_only=True)
class Geometry(Result):
    """Where positive pairs and all embeddings lie on the unit sphere.

    Attributes:
        alignment: Mean squared distance of positive pairs, in [0, 4]; lower is better. NaN where embeddings are
            zero and have no direction.
        uniformity: Log of the mean Gaussian potential of all pairs, in [-8, 0]; lower is better. NaN likewise.
        samples: Images, each seen as two random views.
        split: `train` or `test`.
        epoch: Of the checkpoint; None if unknown.
    """

    alignment: float
    uniformity: float
    samples: int
    split: str
    epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("alignment", "uniformity"):
            value = getattr(self, name)
            object.__setattr__(self, name, float("nan") if value is None else float(value))

    def to_frame(self) -> Any:
        """One row (a pandas DataFrame)."""
        import pandas as pd

        return pd.DataFrame([asdict(self)])


@dataclass(frozen=True, kw_only=True)
class LayerProfile(Result):
    """One number per layer.

    Attributes:
        measure: Such as `effective_rank`.
        layers: Names, in execution order.
        values, low, high: The value and its confidence interval; NaN where a layer has none.
        ceiling: The largest value that the number of samples in a batch (or in all) allows; NaN where there is none.
        samples: Samples seen.
        cautions: What to know about it.
    """

    measure: str
    layers: tuple[str, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ceiling: float
    samples: int
    cautions: tuple[Caution, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ceiling", float("nan") if self.ceiling is None else float(self.ceiling))
        object.__setattr__(self, "cautions", restore_cautions(self.cautions))
        for name in ("values", "low", "high"):
            series = tuple(float("nan") if v is None else float(v) for v in getattr(self, name))
            if len(series) != len(self.layers):
                raise ShapeError(f"{name} has {len(series)} numbers for {len(self.layers)} layers")
            object.__setattr__(self, name, series)
        object.__setattr__(self, "layers", tuple(self.layers))

    def to_frame(self) -> Any:
        """One row per layer: layer, measure, value, low, high (a pandas DataFrame)."""
        import pandas as pd

        columns = {"layer": self.layers, "value": self.values, "low": self.low, "high": self.high}
        return pd.DataFrame(columns).assign(measure=self.measure)


def restore_cautions(cautions: Iterable[Any]) -> tuple[Caution, ...]:
    """Cautions as objects again after a trip through JSON."""
    made = [c if isinstance(c, Caution) else Caution(**c) for c in cautions]
    return tuple(Caution(code=c.code, text=c.text, layers=tuple(c.layers)) for c in made)


def _freeze(result: Any, name: str) -> None:
    """A field as a float64 array that can't be written to; null is NaN."""
    given = getattr(result, name)
    array = np.array(given, dtype=np.float64).reshape(np.shape(given))
    array.setflags(write=False)
    object.__setattr__(result, name, array)


def _without_stamp(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in ("type", "schema")}


def _place(name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise UnknownLayerError(f"no layer {name!r} in this matrix; {closest(name, names)}")
    return names.index(name)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
