"""What a study says about layers: freezing before against after, and whether the advice from CKA was good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from layerlens.analysis.results import Result
from layerlens.errors import DataError
from layerlens.experiments.results import Interval, StudyResult, interval


@dataclass(frozen=True, kw_only=True)
class FreezeEffect:
    """What freezing before and after each target costs, from one kind of weights.

    Attributes:
        start: `random`, or the name of the start.
        before, after: Layer -> gain over the unfrozen run with the same target, seed by seed.
        difference: Of the two, before minus after, mean over layers of each seed; above 0 where it is the layers after
            the target that must learn.
    """

    start: str
    before: dict[str, Interval]
    after: dict[str, Interval]
    difference: Interval

    def __str__(self) -> str:
        d, what = self.difference, f"From {self.start} weights, freezing what lies before the target"
        size = f"{abs(100 * d.mean):.1f} points (95 % {_points(d, abs_of=d.mean)}, {d.n} seeds)"
        if not (d.low > 0 or d.high < 0):
            return f"{what} or after it makes no difference that {d.n} seeds can tell: {_signed(d)}."
        better, worse = ("less", "after") if d.mean > 0 else ("more", "before")
        return (
            f"{what} costs {size} {better} than freezing what lies after it: the layers {worse} the target must learn."
        )


def freeze_effects(result: StudyResult, metric: str = "probe") -> list[FreezeEffect]:
    """Freeze-before and freeze-after against the unfrozen run, per start; arms with the axes `part` and `layer`.

    A layer counts where every seed has all three runs.

    Raises:
        DataError: The study froze nothing, or has no unfrozen runs beside.
    """
    starts = list(dict.fromkeys(run["start"] for run in result.runs if "part" in run["values"]))
    found = [_freeze_effect(result, metric, start) for start in starts]
    if not found:
        raise DataError(f"{result.name!r} has no runs with an axis freeze.part; `layerlens study list` names one")
    return found


def _freeze_effect(result: StudyResult, metric: str, start: str | None) -> FreezeEffect:
    here = [run for run in result.runs if run["start"] == start and "layer" in run["values"]]
    frozen = [run for run in here if "part" in run["values"]]
    free = {run["arm"] for run in here if "part" not in run["values"]}
    if len(free) != 1:
        raise DataError(f"{result.name!r} needs one unfrozen arm with the axis layer from {start or 'random'} weights")
    arm, unfrozen = frozen[0]["arm"], free.pop()
    costs: dict[str, dict[str, dict[int, float]]] = {"before": {}, "after": {}}
    for layer in dict.fromkeys(run["values"]["layer"] for run in frozen):
        beside = result.scores(metric, arm=unfrozen, layer=layer)
        for part, kept in costs.items():
            scores = result.scores(metric, arm=arm, layer=layer, part=part)
            kept[layer] = {seed: scores[seed] - beside[seed] for seed in scores if seed in beside}
    seeds = set.intersection(*(set(cost) for kept in costs.values() for cost in kept.values()))
    per_seed = [
        float(np.mean([costs["before"][layer][seed] - costs["after"][layer][seed] for layer in costs["before"]]))
        for seed in sorted(seeds)
    ]
    if not per_seed:
        raise DataError(f"no seed of {result.name!r} has every run from {start or 'random'} weights yet")
    means = {part: {k: interval(list(v.values())) for k, v in kept.items()} for part, kept in costs.items()}
    return FreezeEffect(
        start=start or "random", before=means["before"], after=means["after"], difference=interval(per_seed)
    )


@dataclass(frozen=True, kw_only=True)
class AdviceOutcome(Result):
    """Whether augmenting where CKA said was better than the alternatives, seed by seed.

    Attributes:
        metric: The score.
        advised: Per seed with an advice: seed, layer, stop_gradient, score, and `rank` among `of` measured settings.
        without: Seeds whose baseline run supported no choice.
        against: `baseline`, `last layer`, `middle layer` and `mean of all` -> mean difference with interval; the other
            layers have the stop-gradient of the advice.
    """

    metric: str
    advised: tuple[dict[str, Any], ...]
    without: tuple[int, ...]
    against: dict[str, dict[str, float]]

    def __str__(self) -> str:
        lines = [f"{len(self.advised)} of {len(self.advised) + len(self.without)} seeds have a supported advice"]
        for row in self.advised:
            how = "with" if row["stop_gradient"] else "without"
            lines.append(
                f"seed {row['seed']}: {row['layer']} {how} stop-gradient, {self.metric} {row['score']:.4f}, "
                f"rank {row['rank']} of {row['of']}"
            )
        for name, d in self.against.items():
            found = Interval(**{k: d[k] for k in ("mean", "low", "high")}, n=int(d["n"]))
            lines.append(f"advised minus {name}: {_signed(found)}, {found.n} seeds")
        return "\n".join(lines)


def advice_outcome(result: StudyResult, metric: str = "probe", *, arm: str, baseline: str) -> AdviceOutcome:
    """Compare, in each seed, the setting that the baseline's own CKA recommends with the others that were run.

    The advice of a seed is the first target of that seed's baseline run; nothing else about it is chosen here.

    Args:
        result: Of a sweep with the axes `layer` and `stop_gradient`.
        metric: A score of the last checkpoint.
        arm: The augmented runs.
        baseline: The runs without augmentation.

    Raises:
        DataError: The sweep does not hold what is advised, or has no such arms.
    """
    measured: dict[int, dict[tuple[str, bool], float]] = {}
    layers: dict[str, None] = {}
    for line in (run for run in result.runs if run["arm"] == arm):
        values = line["values"]
        score = result.scores(metric, arm=arm, **values)[line["seed"]]
        measured.setdefault(line["seed"], {})[values["layer"], values["stop_gradient"]] = score
        layers[values["layer"]] = None
    plain = {run["seed"]: run for run in result.runs if run["arm"] == baseline}
    if not measured or not plain:
        raise DataError(f"{result.name!r} needs finished runs of {arm!r} and {baseline!r}")
    scores = result.scores(metric, arm=baseline)
    rows = list(_advised(plain, measured))
    inner = [name for name in layers if name != "input"]
    places = {"last layer": inner[-1], "middle layer": inner[(len(inner) - 1) // 2]}
    differences: dict[str, list[float]] = {"baseline": [r["score"] - scores[r["seed"]] for r in rows]}
    for name, layer in places.items():
        others = [measured[r["seed"]][layer, r["stop_gradient"]] for r in rows]
        differences[f"{name} ({layer})"] = [r["score"] - o for r, o in zip(rows, others, strict=True)]
    differences["mean of all"] = [r["score"] - float(np.mean(list(measured[r["seed"]].values()))) for r in rows]
    against = {name: asdict(interval(values)) for name, values in differences.items() if values}
    without = tuple(seed for seed in plain if seed in measured and seed not in {r["seed"] for r in rows})
    return AdviceOutcome(metric=metric, advised=tuple(rows), without=without, against=against)


def _advised(
    plain: dict[int, dict[str, Any]], measured: dict[int, dict[tuple[str, bool], float]]
) -> Iterator[dict[str, Any]]:
    for seed, run in plain.items():
        if not run["advice"] or seed not in measured:
            continue
        first, settings = run["advice"][0], measured[seed]
        where = first["layer"], first["stop_gradient"]
        if where not in settings:
            raise DataError(f"seed {seed} is advised {where}, which the sweep did not run; add that layer to its axis")
        rank = 1 + sum(score > settings[where] for score in settings.values())
        yield {
            "seed": seed, "layer": where[0], "stop_gradient": where[1], "score": settings[where], "rank": rank,
            "of": len(settings),
        }  # fmt: skip


def _points(found: Interval, *, abs_of: float) -> str:
    sign = 1 if abs_of >= 0 else -1
    low, high = sorted((100 * sign * found.low, 100 * sign * found.high))
    return f"{low:.1f} to {high:.1f}"


def _signed(found: Interval) -> str:
    if found.low != found.low:
        return f"{100 * found.mean:+.1f} points"
    return f"{100 * found.mean:+.1f} points (95 % {100 * found.low:+.1f} to {100 * found.high:+.1f})"
