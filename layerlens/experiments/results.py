"""What a study found: every score of every checkpoint in long form, means with intervals, comparisons seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from layerlens.analysis.results import FilmStrip, Result, SimilarityMatrix
from layerlens.errors import DataError, RunFolderError, check_known
from layerlens.experiments.store import Store
from layerlens.files import read_json
from layerlens.provenance import provenance
from layerlens.recommendation import recommend
from layerlens.trajectory import Trajectory

R = TypeVar("R", bound=Result)
ALWAYS = ("layer", "stop_gradient", "rate")  # columns of every long table


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds with its Student interval; the bounds are NaN for a single seed."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """One setting of a study: an arm with a value of each axis.

    Attributes:
        arm: Its name.
        values: Short name of each axis -> value.
        baseline: Whether it is what others are compared with.
        score: Over its seeds.
        gain: Over its baseline, seed by seed; None for a baseline, or where no seed has both.
    """

    arm: str
    values: dict[str, Any]
    baseline: bool
    score: Interval
    gain: Interval | None


@dataclass(frozen=True, kw_only=True)
class StudyResult(Result):
    """Everything that the finished runs of a study measured.

    Attributes:
        name: Of the study.
        study: What it says.
        runs: Of each finished run `key`, `arm`, `baseline`, `start` (an arm's), `values`, `seed`, `data` (trained on),
            `wall_s`, `scores` (data -> one row per kept checkpoint; "" is the run's own data), `advice` (ranked targets
            that the CKA of this run gives, for baselines from random weights) and `environment`.
        similarity: Of each setting the mean CKA over seeds at the first and at the last checkpoint.
        settings: Each setting that was planned, finished or not, in the order of the study: `arm` and `values`.
        failed: Labels of runs that were given up, with their errors.
        missing: Runs that are neither finished nor given up.
        environment: Where the table was made.
    """

    name: str
    study: dict[str, Any]
    runs: tuple[dict[str, Any], ...]
    similarity: tuple[dict[str, Any], ...]
    failed: dict[str, str]
    missing: int
    environment: dict[str, Any]
    settings: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", tuple(self.settings))
        object.__setattr__(self, "runs", tuple(self.runs))
        object.__setattr__(self, "similarity", tuple(self.similarity))

    def to_frame(self) -> Any:
        """Long form, one row per number (a pandas DataFrame).

        Columns: arm, start, key, the axes, seed, data, epoch, metric, value. layer, stop_gradient and rate are there
        always: of Deep Augmentation, where they are no axes.
        """
        import pandas as pd

        axes = list(dict.fromkeys((*ALWAYS, *(name for run in self.runs for name in run["values"]))))
        rows = []
        for run in self.runs:
            head = {"arm": run["arm"], "start": run["start"], "key": run["key"]}
            operator = run.get("augment") or {}
            head |= {axis: run["values"].get(axis, operator.get(axis)) for axis in axes} | {"seed": run["seed"]}
            for data, scores in run["scores"].items():
                for row in scores:
                    rows += [
                        {**head, "data": data, "epoch": row["epoch"], "metric": metric, "value": value}
                        for metric, value in row.items()
                        if metric != "epoch"
                    ]
        columns = ["arm", "start", "key", *axes, "seed", "data", "epoch", "metric", "value"]
        return pd.DataFrame(rows, columns=None if rows else columns)

    def metrics(self, data: str | None = None) -> list[str]:
        """Names of all scores that any run has, on any data or on these ("" is the runs' own)."""
        rows = (
            row for run in self.runs for name, scores in run["scores"].items() if data in (None, name) for row in scores
        )
        return list(dict.fromkeys(name for row in rows for name in row if name != "epoch"))

    def lines(
        self, metric: str = "probe", *, epoch: int | None = None, data: str = "", level: float = 0.95
    ) -> list[Line]:
        """Each setting's score over its seeds, and its gain over the baseline, paired by seed.

        Args:
            metric: A score, such as `probe`, `knn` or `uniformity_test`.
            epoch: Of the checkpoint; the last one by default. Never the best one.
            data: Other data that were scored; the run's own by default.
            level: Confidence of the Student intervals.

        Raises:
            UnknownNameError: No run has that score.
            DataError: No run has it at that epoch, or on those data.
        """
        check_known("metric", metric, self.metrics())
        found, settings = [], _by_setting(self.runs)
        baselines = [runs for runs in settings if runs[0]["baseline"]]
        for runs in settings:
            scores = self._scores(runs, metric, epoch, data)
            if not scores:
                continue
            first = runs[0]
            gain = None
            alone = first["baseline"] or first["arm"] in self.study["starts"]
            if not alone and (beside := _baseline(first, baselines)):
                other = self._scores(beside, metric, epoch, data)
                pairs = [scores[seed] - other[seed] for seed in scores if seed in other]
                gain = interval(pairs, level) if pairs else None
            found.append(
                Line(
                    arm=first["arm"], values=first["values"], baseline=first["baseline"],
                    score=interval(list(scores.values()), level), gain=gain,
                )
            )  # fmt: skip
        if not found:
            raise DataError(self._nothing(metric, epoch, data))
        return found

    def _nothing(self, metric: str, epoch: int | None, data: str) -> str:
        """Why no run has a score, and what there is."""
        known = list(dict.fromkeys(name for run in self.runs for name in run["scores"]))
        if data not in known:
            there = ", ".join(repr(name) if name else "the runs' own data" for name in known) or "no data"
            wanted = repr(data) if data else "the runs' own data"
            return f"{self.name!r} has no scores on {wanted}; there are those on {there}"
        rows = [row for run in self.runs for row in run["scores"].get(data, []) if row.get(metric) is not None]
        where = "the last epoch" if epoch is None else f"epoch {epoch}"
        epochs = ", ".join(str(number) for number in sorted({row["epoch"] for row in rows}))
        return f"{self.name!r} has no {metric} at {where}; it was measured at {epochs or 'none'}"

    def table(self, metric: str = "probe", *, epoch: int | None = None, data: str = "", level: float = 0.95) -> Any:
        """`lines` as a table (a pandas DataFrame): arm, axes, n, mean, low, high, gain, gain_low, gain_high."""
        import pandas as pd

        rows = []
        for line in self.lines(metric, epoch=epoch, data=data, level=level):
            gain = line.gain or Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
            rows.append(
                {
                    "arm": line.arm, **line.values, "n": line.score.n, "mean": line.score.mean, "low": line.score.low,
                    "high": line.score.high, "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high,
                }
            )  # fmt: skip
        axes = list(dict.fromkeys(name for run in self.runs for name in run["values"]))
        columns = ["arm", *axes, "n", "mean", "low", "high", "gain", "gain_low", "gain_high"]
        return pd.DataFrame(rows, columns=columns)

    def scores(
        self, metric: str = "probe", *, epoch: int | None = None, data: str = "", **where: Any
    ) -> dict[int, float]:
        """Seed -> score of the one setting that has these values.

        Args:
            metric, epoch, data: As for `lines`.
            **where: `arm`, `start`, or short names of axes.

        Raises:
            DataError: None has them, or several have.
            UnknownNameError: No run has that score.
        """
        check_known("metric", metric, self.metrics())
        chosen = [runs for runs in _by_setting(self.runs) if _fits(runs[0], where)]
        if len(chosen) != 1:
            raise DataError(f"{len(chosen)} settings of {self.name!r} have {where}; needed: one")
        return self._scores(chosen[0], metric, epoch, data)

    def mean_similarity(self, *, last: bool = True, **where: Any) -> SimilarityMatrix:
        """Mean CKA over seeds of the one setting that has these values, at its last checkpoint or at its first.

        The intervals are Student's over seeds.
        """
        found = [s for s in self.similarity if _fits(s, where)]
        if len(found) != 1:
            raise DataError(f"{len(found)} settings of {self.name!r} with CKA have {where}; needed: one")
        kept = found[0]["last" if last else "first"]
        return SimilarityMatrix.from_dict(kept)

    @staticmethod
    def _scores(runs: Iterable[dict[str, Any]], metric: str, epoch: int | None, data: str) -> dict[int, float]:
        found = {}
        for run in runs:
            rows = [row for row in run["scores"].get(data, []) if epoch is None or row["epoch"] == epoch]
            value = rows[-1].get(metric) if rows else None
            if value is not None and math.isfinite(value):
                found[run["seed"]] = float(value)
        return found


def _by_setting(runs: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs of each setting, in the order of the study."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(repr((run["arm"], run["values"])), []).append(run)
    return list(groups.values())


def _baseline(run: dict[str, Any], baselines: list[list[dict[str, Any]]]) -> list[dict[str, Any]] | None:
    """The baseline on the same data whose values a run all has; of its own start first, with most values next."""
    fitting = [
        runs for runs in baselines
        if runs[0]["data"] == run["data"] and runs[0]["values"].items() <= run["values"].items()
    ]  # fmt: skip
    shared = [(runs[0]["start"] == run["start"], len(runs[0]["values"])) for runs in fitting]
    return fitting[shared.index(max(shared))] if fitting else None


def collect(store: Store, name: str, *, plan: dict[str, Any] | None = None) -> StudyResult:
    """Read what a store has of a study; what is missing there is counted, not waited for.

    Args:
        store: Where the runs lie.
        name: Of the study.
        plan: What it wants (`runner.manifest`); what the store keeps under that name by default.

    Raises:
        UnknownNameError: No such study was begun there.
        DataError, RunFolderError: A measurement is damaged; it names the file.
    """
    plan = plan or store.read_plan(name)
    starts = {arm["name"]: arm["start"] for arm in plan["study"]["arms"]}
    runs, strips, failed, missing = [], dict[str, FilmStrip](), {}, 0
    for planned in plan["runs"]:
        key = planned["key"]
        if not store.is_done(key, tuple(planned["files"])):
            failures = store.failures(key)
            if failures["given_up"]:
                failed[label(planned["arm"], planned["values"], planned["seed"])] = failures["attempts"][-1]["error"]
            else:
                missing += 1
            continue
        run, strip = _read_run(store, planned, starts.get(planned["arm"]))
        runs.append(run)
        if strip is not None:
            strips[key] = strip
    return StudyResult(
        name=name, study=plan["study"], runs=tuple(runs), similarity=tuple(_means(runs, strips)), failed=failed,
        missing=missing, environment=provenance(),
        settings=tuple({"arm": runs[0]["arm"], "values": runs[0]["values"]} for runs in _by_setting(plan["runs"])),
    )  # fmt: skip


def label(arm: str, values: dict[str, Any], seed: int) -> str:
    """A run in words."""
    return " ".join([arm, *(f"{name}={value}" for name, value in values.items()), f"seed={seed}"])


def lower_is_better(metric: str) -> bool:
    """Whether it is a score of the geometry, and no accuracy."""
    return metric.startswith(("alignment", "uniformity"))


def _read_run(store: Store, planned: dict[str, Any], start: str | None) -> tuple[dict[str, Any], FilmStrip | None]:
    folder = store.run_folder(planned["key"])
    result = read_json(folder / "result.json")
    scores, strip = {}, None
    for kind, data, file in planned["measured"]:
        if kind == "cka":
            strip = _read(FilmStrip, folder / file)
        else:
            scores[data or ""] = list(_read(Trajectory, folder / file).rows)
    run = {
        "key": planned["key"], "arm": planned["arm"], "baseline": planned["baseline"], "start": start,
        "values": planned["values"], "seed": planned["seed"], "data": planned["data"],
        "augment": planned["augment"],
        "wall_s": result["wall_s"], "scores": scores,
        "advice": _advice(strip) if strip and planned["baseline"] and planned["start"] is None else [],
        "environment": result["environment"],
    }  # fmt: skip
    return run, strip


def _read(kind: type[R], path: Path) -> R:
    """A measurement.

    Raises:
        RunFolderError: It is damaged, or of a newer layerlens.
    """
    try:
        found = kind.from_dict(read_json(path))
        if isinstance(found, Trajectory) and not all(isinstance(row, dict) and "epoch" in row for row in found.rows):
            raise DataError("a row without its epoch")
    except DataError as error:
        raise RunFolderError(f"{str(path)!r} can't be read ({error}); delete it to have it made again") from error
    return found


def _advice(strip: FilmStrip) -> list[dict[str, Any]]:
    """What the first and the last CKA matrix of a run recommend."""
    found = recommend(strip.frames[-1], strip.frames[0])
    return [{"layer": t.layer, "stop_gradient": t.stop_gradient, "confidence": t.confidence} for t in found.targets]


def _means(runs: Iterable[dict[str, Any]], strips: dict[str, FilmStrip]) -> Iterator[dict[str, Any]]:
    """Of each setting the mean matrices over its seeds; strips by the key of their run."""
    for setting in _by_setting(run for run in runs if run["key"] in strips):
        first, found = setting[0], [strips[run["key"]] for run in setting]
        yield {
            "arm": first["arm"], "start": first["start"], "values": first["values"], "seeds": len(found),
            "first": _mean([s.frames[0] for s in found]).to_dict(),
            "last": _mean([s.frames[-1] for s in found]).to_dict(),
        }  # fmt: skip


def _mean(matrices: Sequence[SimilarityMatrix]) -> SimilarityMatrix:
    """The mean over seeds, with its Student interval."""
    values = np.stack([m.values for m in matrices])
    mean, reach = values.mean(0), np.full(values.shape[1:], np.nan)
    if len(values) > 1:
        reach = _student(len(values), 0.95) * values.std(0, ddof=1) / math.sqrt(len(values))
    rounded = [np.round(part, 4) for part in (mean, mean - reach, mean + reach)]
    none = np.zeros((0, *values.shape[1:]))
    return replace(
        matrices[0], values=rounded[0], low=rounded[1], high=rounded[2], level=0.95, blocks=none, replicates=none,
        weights=np.zeros(0), participation=np.round(np.stack([m.participation for m in matrices]).mean(0), 4),
        precision_error=math.nan, cautions=(),
    )  # fmt: skip


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of some values, one per seed, with its Student interval.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan, n=len(values))
    reach = _student(len(values), level) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - reach, high=mean + reach, n=len(values))


def _student(n: int, level: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, n - 1))


def _fits(setting: dict[str, Any], where: dict[str, Any]) -> bool:
    return all(
        (setting[name] if name in ("arm", "start", "baseline") else setting["values"].get(name)) == value
        for name, value in where.items()
    )
