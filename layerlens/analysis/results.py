"""The frozen result types; each leaves as a frame or as JSON and comes back from JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from layerlens.errors import DataError, ShapeError

SCHEMA = 1
Array = npt.NDArray[np.float64]
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
class SimilarityMatrix(Result):
    """Similarity of all pairs of L layers on the same samples.

    Attributes:
        layers: Names, in execution order.
        values: Shape (L, L), symmetric; NaN where a layer is constant, so that there is no similarity.
        low, high: Ends of the confidence interval of each entry; NaN where there is none (fewer than two batches).
        level: Confidence of the intervals, in (0, 1).
        measure: What was measured, such as `cka`.
        kernel: `linear` or `rbf`.
        estimator: `minibatch`, `debiased` or `biased`.
        samples: Samples seen.
        participation: Shape (L,): how many directions carry each layer's variance, (Σλ)² / Σλ², at least 1,
            averaged over batches.
        blocks: Shape (B, L, L): HSIC sums of B groups of batches, for resampling.
        weights: Shape (B,): samples in each group.
    """

    layers: tuple[str, ...]
    values: Array
    low: Array
    high: Array
    level: float = 0.95
    measure: str = "cka"
    kernel: str = "linear"
    estimator: str = "minibatch"
    samples: int
    participation: Array
    blocks: Array = field(repr=False)
    weights: Array = field(repr=False)

    def __post_init__(self) -> None:
        count = len(self.layers)
        shapes = {
            "values": (count, count), "low": (count, count), "high": (count, count), "participation": (count,),
            "weights": (len(self.weights),), "blocks": (len(self.weights), count, count),
        }  # fmt: skip
        object.__setattr__(self, "layers", tuple(self.layers))
        for name, shape in shapes.items():
            array = np.array(getattr(self, name), dtype=np.float64).reshape(np.shape(getattr(self, name)))
            if array.shape != shape:
                raise ShapeError(f"{name} has shape {array.shape}; {count} layers need {shape}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def missing(self) -> tuple[str, ...]:
        """Layers without a similarity, because they are constant over the samples."""
        return tuple(name for name, value in zip(self.layers, self.values.diagonal(), strict=True) if np.isnan(value))

    def between(self, first: str, second: str) -> float:
        """The similarity of two layers by name."""
        return float(self.values[self.layers.index(first), self.layers.index(second)])

    def to_frame(self) -> Any:
        """One row per pair of layers: layer_a, layer_b, value, low, high, measure (a pandas DataFrame)."""
        import pandas as pd

        rows = [
            {
                "layer_a": a, "layer_b": b, "value": self.values[i, j], "low": self.low[i, j],
                "high": self.high[i, j], "measure": self.measure,
            }
            for i, a in enumerate(self.layers)
            for j, b in enumerate(self.layers)
        ]  # fmt: skip
        return pd.DataFrame(rows)


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
    """One number per layer, measured within batches.

    Attributes:
        measure: Such as `effective_rank`.
        layers: Names, in execution order.
        values, low, high: Mean over batches and its confidence interval; NaN where a layer is constant.
        ceiling: The largest value that the batch size allows.
        samples: Samples seen.
    """

    measure: str
    layers: tuple[str, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ceiling: float
    samples: int

    def __post_init__(self) -> None:
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
