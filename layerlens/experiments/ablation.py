"""What a study says about layers: freezing before against after, and whether the advice from CKA was good."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from layerlens.analysis.results import Result
from layerlens.errors import DataError, check_known, require
from layerlens.experiments.results import Interval, StudyResult, interval, lower_is_better


@dataclass(frozen=True, kw_only=True)
class FreezeEffect:
    """What freezing before and after each target costs, from one kind of weights.

    Attributes:
        start: `random`, or the name of the start.
        before, after: Layer -> gain over the unfrozen run with the same target, seed by seed.
        at: Layer -> difference of the two, before minus after, seed by seed.
        difference: Its mean over the layers of each seed; above 0 where it is the layers after the target that must
            learn.
    """

    start: str
    before: dict[str, Interval]
    after: dict[str, Interval]
    at: dict[str, Interval]
    difference: Interval

    def __str__(self) -> str:
        return f"{self._overall()} {self._by_layer()}" if len(self.at) > 1 else self._overall()

    def _by_layer(self) -> str:
        """At which targets the one costs more, beyond chance, and at which the other."""
        sides = {
            "before": [layer for layer, d in self.at.items() if d.high < 0],
            "after": [layer for layer, d in self.at.items() if d.low > 0],
        }
        told = [f"freezing {part} costs more at {', '.join(names)}" for part, names in sides.items() if names]
        rest = [layer for layer in self.at if layer not in (*sides["before"], *sides["after"])]
        told += [f"undecided at {', '.join(rest)}"] if rest else []
        return f"Target by target: {'; '.join(told)}."

    def _overall(self) -> str:
        d, what = self.difference, f"From {self.start} weights, freezing what lies before the target"
        size = f"{abs(100 * d.mean):.1f} points (95 % {_points(d, abs_of=d.mean)}, {d.n} seeds)"
        if d.n == 1:
            return f"{what} rather than after it: {_signed(d)} in a single seed, which shows nothing."
        if not (d.low > 0 or d.high < 0):
            return f"{what} or after it makes no difference that {d.n} seeds can tell: {_signed(d)}."
        better, worse = ("less", "after") if d.mean > 0 else ("more", "before")
        return (
            f"{what} costs {size} {better} than freezing what lies after it: the layers {worse} the target must learn."
        )


def freeze_effects(result: StudyResult, metric: str = "probe") -> list[FreezeEffect]:
    """Freeze-before and freeze-after against the unfrozen run, per start; arms with the axes `part` and `layer`.

    A layer counts where a seed has all three runs, a seed where it has every layer that counts, and a start where it
    has such a seed.

    Raises:
        DataError: The study froze nothing, has no unfrozen runs beside, or is not that far.
        UnknownNameError: No run has that score.
    """
    starts = list(dict.fromkeys(run["start"] for run in result.runs if "part" in run["values"]))
    if not starts:
        raise DataError(f"{result.name!r} has no runs with an axis freeze.part; `layerlens study list` names one")
    _check_accuracy(result, metric)
    found = [effect for start in starts if (effect := _freeze_effect(result, metric, start)) is not None]
    if not found:
        raise DataError(f"no seed of {result.name!r} has every run from {starts[0] or 'random'} weights yet")
    return found


def _freeze_effect(result: StudyResult, metric: str, start: str | None) -> FreezeEffect | None:
    here = [run for run in result.runs if run["start"] == start and "layer" in run["values"]]
    frozen = list(dict.fromkeys(run["arm"] for run in here if "part" in run["values"]))
    free = list(dict.fromkeys(run["arm"] for run in here if "part" not in run["values"]))
    for kind, arms in (("frozen", frozen), ("unfrozen", free)):
        if len(arms) != 1:
            raise DataError(
                f"{result.name!r} needs one {kind} arm with the axis layer from {start or 'random'} weights, got {arms}"
            )
    costs: dict[str, dict[str, dict[int, float]]] = {"before": {}, "after": {}}
    for layer in dict.fromkeys(run["values"]["layer"] for run in here):
        beside = _scores(here, metric, result, arm=free[0], layer=layer)
        parts = {part: _scores(here, metric, result, arm=frozen[0], layer=layer, part=part) for part in costs}
        if not beside.keys() & parts["before"].keys() & parts["after"].keys():
            continue
        for part, scores in parts.items():
            costs[part][layer] = {seed: scores[seed] - beside[seed] for seed in scores if seed in beside}
    both = {
        layer: {s: costs["before"][layer][s] - cost for s, cost in after.items() if s in costs["before"][layer]}
        for layer, after in costs["after"].items()
    }
    every = [set(cost) for kept in costs.values() for cost in kept.values()]
    per_seed = [
        float(np.mean([found[seed] for found in both.values()]))
        for seed in sorted(set.intersection(*every) if every else ())
    ]
    if not per_seed:
        return None
    means = {part: {k: interval(list(v.values())) for k, v in kept.items()} for part, kept in costs.items()}
    return FreezeEffect(
        start=start or "random", before=means["before"], after=means["after"], difference=interval(per_seed),
        at={layer: interval(list(found.values())) for layer, found in both.items()},
    )  # fmt: skip


def _scores(
    runs: list[dict[str, Any]], metric: str, result: StudyResult, *, arm: str, **values: Any
) -> dict[int, float]:
    """Seed -> score of the finished runs with exactly these values; empty where there are none."""
    there = any(run["arm"] == arm and run["values"] == values for run in runs)
    return result.scores(metric, arm=arm, **values) if there else {}


def _check_accuracy(result: StudyResult, metric: str) -> None:
    check_known("metric", metric, result.metrics())
    if lower_is_better(metric):
        raise DataError(f"{metric} is no accuracy, of which more is better; name another metric")


@dataclass(frozen=True, kw_only=True)
class AdviceOutcome(Result):
    """Whether augmenting where CKA said was better than the alternatives, seed by seed.

    Attributes:
        metric: The score.
        advised: Per seed with an advice: seed, layer, stop_gradient, score, and `rank` among `of` measured settings.
        without: Seeds whose baseline run supported no choice.
        against: `baseline`, `last layer`, `middle layer` and `mean of all` -> mean difference with interval, over the
            seeds that have both; the other layers have the stop-gradient of the advice.
        mean_rank: Mean of the ranks over the seeds, with interval; empty without an advised seed.
        outside: Seeds that are advised what the sweep did not run: seed, layer, stop_gradient.
        unfinished: Seeds whose advised run has no score yet.
    """

    metric: str
    advised: tuple[dict[str, Any], ...]
    without: tuple[int, ...]
    against: dict[str, dict[str, float]]
    outside: tuple[dict[str, Any], ...] = ()
    unfinished: tuple[int, ...] = ()
    mean_rank: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("advised", "without", "outside", "unfinished"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "against", {name: _restored(d) for name, d in self.against.items()})
        object.__setattr__(self, "mean_rank", _restored(self.mean_rank))

    def __str__(self) -> str:
        supported = len(self.advised) + len(self.outside) + len(self.unfinished)
        lines = [f"{supported} of {supported + len(self.without)} seeds have a supported advice"]
        lines += [
            f"seed {row['seed']}: {_place(row)}, {self.metric} {row['score']:.4f}, rank {row['rank']} of {row['of']}"
            for row in self.advised
        ]
        lines += [f"seed {row['seed']}: {_place(row)}, which this sweep does not run" for row in self.outside]
        lines += [f"seed {seed}: its advised run is not finished" for seed in self.unfinished]
        if len(self.advised) > 1 and self.mean_rank:
            r, of = self.mean_rank, self.advised[0]["of"]
            reach = f"(95 % {r['low']:.1f} to {r['high']:.1f})"
            lines.append(f"mean rank {r['mean']:.1f} of {of} {reach}; by chance {(of + 1) / 2:.1f}")
        for name, d in self.against.items():
            found = Interval(**{k: d[k] for k in ("mean", "low", "high")}, n=int(d["n"]))
            lines.append(f"advised minus {name}: {_signed(found)}, {found.n} seed{'s' if found.n > 1 else ''}")
        return "\n".join(lines)


def _restored(numbers: dict[str, Any]) -> dict[str, float]:
    """Numbers with their NaN again after a trip through JSON."""
    return {k: math.nan if v is None else v for k, v in numbers.items()}


def advice_outcome(
    result: StudyResult, metric: str = "probe", *, arm: str, baseline: str, target: int = 1
) -> AdviceOutcome:
    """Compare, in each seed, the setting that the baseline's own CKA recommends with the others that were run.

    The advice of a seed is one target of that seed's baseline run; nothing else about it is chosen here.

    Args:
        result: Of a sweep with the axes `layer` and `stop_gradient`.
        metric: An accuracy of the last checkpoint.
        arm: The augmented runs.
        baseline: The runs without augmentation.
        target: Which of each seed's ranked targets, counted from 1: the first by default.

    Raises:
        DataError: The sweep holds nothing of what is advised, or has no such arms; or the metric is no accuracy.
        UnknownNameError: No run has that score.
    """
    planned = result.settings or result.runs  # also what is not finished: it decides which layer is the last
    settings = list(dict.fromkeys(_setting(run) for run in planned if run["arm"] == arm))
    plain = {run["seed"]: run for run in result.runs if run["arm"] == baseline}
    if not settings or not plain:
        raise DataError(f"{result.name!r} needs finished runs of {arm!r} and {baseline!r}")
    _check_accuracy(result, metric)
    finished = {_setting(run) for run in result.runs if run["arm"] == arm}
    scores = {
        s: result.scores(metric, arm=arm, layer=s[0], stop_gradient=s[1]) if s in finished else {} for s in settings
    }
    seeds = [seed for seed in plain if any(run["seed"] == seed for run in result.runs if run["arm"] == arm)]
    require(target >= 1, "target", target, "1 for the first target, 2 for the second, …")
    told = {seed: plain[seed]["advice"] for seed in seeds}
    first = {seed: _setting({"values": advice[target - 1]}) for seed, advice in told.items() if len(advice) >= target}
    outside = {seed: where for seed, where in first.items() if where not in settings}
    if outside and len(outside) == len(first):
        seed, where = next(iter(outside.items()))
        raise DataError(f"seed {seed} is advised {where}, which the sweep did not run; add that layer to its axis")
    rows = [_advised(seed, first[seed], scores) for seed in first if seed in scores.get(first[seed], {})]
    return AdviceOutcome(
        metric=metric, advised=tuple(rows), without=tuple(seed for seed in seeds if seed not in first),
        against=dict(_differences(rows, scores, result.scores(metric, arm=baseline))),
        outside=tuple({"seed": s, "layer": w[0], "stop_gradient": w[1]} for s, w in outside.items()),
        unfinished=tuple(s for s, w in first.items() if w in scores and s not in scores[w]),
        mean_rank=asdict(interval([row["rank"] for row in rows])) if rows else {},
    )  # fmt: skip


Setting = tuple[str, bool]


def _setting(run: dict[str, Any]) -> Setting:
    return run["values"]["layer"], run["values"]["stop_gradient"]


def _advised(seed: int, where: Setting, scores: dict[Setting, dict[int, float]]) -> dict[str, Any]:
    others = [found[seed] for found in scores.values() if seed in found]
    score = scores[where][seed]
    return {
        "seed": seed, "layer": where[0], "stop_gradient": where[1], "score": score,
        "rank": 1 + sum(other > score for other in others), "of": len(others),
    }  # fmt: skip


def _differences(
    rows: list[dict[str, Any]], scores: dict[Setting, dict[int, float]], plain: dict[int, float]
) -> Iterator[tuple[str, dict[str, float]]]:
    """What the advised runs are compared with -> mean difference over the seeds that have both."""
    inner = [name for name in dict.fromkeys(layer for layer, _ in scores) if name != "input"]
    last, middle = inner[-1], inner[(len(inner) - 1) // 2]
    beside: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "baseline": lambda row: plain.get(row["seed"]),
        f"last layer ({last})": lambda row: scores.get((last, row["stop_gradient"]), {}).get(row["seed"]),
        f"middle layer ({middle})": lambda row: scores.get((middle, row["stop_gradient"]), {}).get(row["seed"]),
        "mean of all": lambda row: float(np.mean([s[row["seed"]] for s in scores.values() if row["seed"] in s])),
    }
    for name, other in beside.items():
        found = [row["score"] - known for row in rows if (known := other(row)) is not None]
        if found:
            yield name, asdict(interval(found))


def _place(row: dict[str, Any]) -> str:
    return f"{row['layer']} {'with' if row['stop_gradient'] else 'without'} stop-gradient"


def _points(found: Interval, *, abs_of: float) -> str:
    sign = 1 if abs_of >= 0 else -1
    low, high = sorted((100 * sign * found.low, 100 * sign * found.high))
    return f"{low:.1f} to {high:.1f}"


def _signed(found: Interval) -> str:
    if found.low != found.low:
        return f"{100 * found.mean:+.1f} points"
    return f"{100 * found.mean:+.1f} points (95 % {100 * found.low:+.1f} to {100 * found.high:+.1f})"
