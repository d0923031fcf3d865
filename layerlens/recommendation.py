"""From similarity to advice: which layers to augment, with stop-gradient or without, why, and with what caution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from layerlens.analysis.regions import Region, RegionSet, find_regions
from layerlens.analysis.results import (
    Caution,
    FilmStrip,
    Geometry,
    Result,
    SimilarityMatrix,
    restore_cautions,
)

NEAR_ZERO = -0.2  # uniformity
COLLAPSED = 1.5  # directions that carry the variance of the last layer
NEARLY_ALL = 0.75  # share of the layers


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer to augment.

    Attributes:
        rank: 1 is the first choice.
        layer: Name.
        index: Place in the similarity matrix, from 0.
        stop_gradient: Whether to block the gradient of the augmented samples there.
        reason: In words.
        confidence: Share of resampled matrices in which the region's edge lies there, in [0, 1].
        evidence: The region's numbers: within, outside, contrast, twin and gain (each None without a twin).
    """

    rank: int
    layer: str
    index: int
    stop_gradient: bool
    reason: str
    confidence: float
    evidence: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Recommendation(Result):
    """Ranked target layers, or the reason why there are none.

    Attributes:
        verdict: `supported`, or `no supported choice`.
        reason: One sentence for the verdict.
        targets: Best first; empty without support.
        regions: The regions behind it, supported or not.
        cautions: What to know before following it.
        samples: Samples behind the similarity.
    """

    verdict: str
    reason: str
    targets: tuple[Target, ...]
    regions: RegionSet
    cautions: tuple[Caution, ...]
    samples: int

    def __post_init__(self) -> None:
        if isinstance(self.regions, dict):
            known = {k: v for k, v in self.regions.items() if k not in ("type", "schema")}
            object.__setattr__(self, "regions", RegionSet(**known))
        object.__setattr__(self, "targets", tuple(Target(**t) if isinstance(t, dict) else t for t in self.targets))
        object.__setattr__(self, "cautions", restore_cautions(self.cautions))

    def to_frame(self) -> Any:
        """One row per target: rank, layer, stop_gradient, confidence, contrast, gain (a pandas DataFrame)."""
        import pandas as pd

        columns = ["rank", "layer", "index", "stop_gradient", "confidence", "reason"]
        rows = [{**{c: getattr(t, c) for c in columns}, **t.evidence} for t in self.targets]
        return pd.DataFrame(rows, columns=None if rows else columns)

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.reason}"]
        for t in self.targets:
            how = "with stop-gradient" if t.stop_gradient else "without stop-gradient"
            lines.append(f"{t.rank}. {t.layer} {how} (confidence {t.confidence:.0%}): {t.reason}")
        return "\n".join([*lines, *(f"{c.code} {c.text}" for c in self.cautions)])


def recommend(
    cka: SimilarityMatrix,
    baseline: SimilarityMatrix | None = None,
    *,
    geometry: Geometry | None = None,
    criterion: str = "two-level",
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Recommendation:
    """Recommend where to apply Deep Augmentation: a region's start with stop-gradient, its end without.

    Regions are ranked by gain over the untrained twin (contrast, where there is none) times relative depth, so that
    the deepest strong region comes first. A region counts only if its contrast is above 0 beyond the chance of
    picking it among all runs, and if training, not the architecture, made it.

    Args:
        cka: Similarity of the trained network's layers.
        baseline: The same layers of a freshly initialised twin, on the same data.
        geometry: Of the embedding; a uniformity near 0 is a collapse.
        criterion, level, resamples, seed: As for `find_regions`.

    Source:
        Brüel Gabrielsson et al. 2023, arXiv:2303.14537, for start and end; the rest is layerlens' own.
    """
    found = find_regions(cka, baseline, criterion=criterion, level=level, resamples=resamples, seed=seed)
    supported = sorted((r for r in found.regions if r.supported), key=lambda r: -_strength(r, cka.layers))
    targets = tuple(_targets(supported, cka.layers))
    cautions = [*found.cautions, *_own_cautions(cka, baseline, found, geometry)]
    if any(t.layer == cka.layers[-1] for t in targets):
        text = f"{cka.layers[-1]} is the last layer: what is transformed there meets the loss and no further layer"
        cautions.append(Caution(code="LL008", text=text, layers=(cka.layers[-1],)))
    return Recommendation(
        verdict="supported" if targets else "no supported choice",
        reason=_verdict(found, supported),
        targets=targets, regions=found, cautions=tuple(sorted(cautions, key=lambda c: c.code)), samples=cka.samples,
    )  # fmt: skip


def advice_over(strip: FilmStrip, *, level: float = 0.95, seed: int = 0) -> list[Recommendation | None]:
    """What each checkpoint of a run recommends, with its first one as the untrained twin.

    Args:
        strip: From `film_strip`.
        level, seed: As for `recommend`.

    Returns:
        One per frame; None for the first, which is what the others are compared with.
    """
    later = [recommend(frame, strip.frames[0], level=level, seed=seed) for frame in strip.frames[1:]]
    return [None, *later]


def settled(
    level: float = 0.95, *, baseline: SimilarityMatrix | None = None, criterion: str = "two-level", seed: int = 0
) -> Callable[[SimilarityMatrix], bool]:
    """Whether a recommendation is settled: for `similarity_matrix(…, settle=settled(0.95))`.

    It is once the matrix supports targets and the edges of each supported region recur in at least `level` of the
    resampled matrices. Since that is a matter of seconds for many layers, it looks each time the samples have grown
    by a quarter.

    Args:
        level: Share of resampled matrices, in (0, 1].
        baseline, criterion, seed: As for `recommend`.
    """

    seen = [0]

    def check(matrix: SimilarityMatrix) -> bool:
        if seen[0] < matrix.samples < 1.25 * seen[0]:
            return False
        seen[0] = matrix.samples
        targets = recommend(matrix, baseline, criterion=criterion, seed=seed).targets
        return bool(targets) and min(target.confidence for target in targets) >= level

    return check


def _strength(region: Region, layers: Sequence[str]) -> float:
    gain = region.gain or region.contrast
    middle = (layers.index(region.layers[0]) + layers.index(region.layers[-1])) / 2
    return gain.value * middle / max(len(layers) - 1, 1)


def _targets(regions: Sequence[Region], layers: Sequence[str]) -> list[Target]:
    made: list[Target] = []
    for region in regions:
        first, last = region.layers[0], region.layers[-1]
        numbers = f"CKA {region.within:.2f} within against {region.outside:.2f} to the layers just outside"
        twin = f", {region.twin.value:+.2f} untrained" if region.twin else ""
        evidence = {
            "within": region.within, "outside": region.outside, "contrast": region.contrast.value,
            "twin": region.twin.value if region.twin else None, "gain": region.gain.value if region.gain else None,
        }  # fmt: skip
        for layer, stop, edge in ((first, True, "starts"), (last, False, "ends")):
            numbered = f"{numbers} (contrast {region.contrast.value:+.2f}{twin})"
            reason = f"the co-adapted run {first} to {last} {edge} here: {numbered}"
            confidence = region.start_confidence if stop else region.end_confidence
            made.append(
                Target(
                    rank=len(made) + 1, layer=layer, index=layers.index(layer), stop_gradient=stop, reason=reason,
                    confidence=confidence, evidence=evidence,
                )
            )  # fmt: skip
    return made


def _own_cautions(
    cka: SimilarityMatrix, baseline: SimilarityMatrix | None, found: RegionSet, geometry: Geometry | None
) -> list[Caution]:
    made = []
    if not any(region.distinct for region in found.regions):
        made.append(
            Caution(code="LL001", text="no region: no run of layers stands out from its neighbours beyond chance")
        )
    if baseline is None:
        made.append(
            Caution(
                code="LL007",
                text="no untrained twin was given: what the architecture alone makes alike is not told apart",
            )
        )
    for region in found.regions:
        if region.supported and len(region.layers) > NEARLY_ALL * len(cka.layers):
            text = (
                f"one run spans {len(region.layers)} of {len(cka.layers)} layers, so its edges say little about where "
                "inside it to augment; try finer layers, or leave out the head"
            )
            made.append(Caution(code="LL009", text=text, layers=region.layers))
    if (collapse := _collapse(cka, geometry)) is not None:
        made.append(Caution(code="LL005", text=f"collapsed embedding: {collapse}", layers=(cka.layers[-1],)))
    return made


def _collapse(cka: SimilarityMatrix, geometry: Geometry | None) -> str | None:
    """What shows that the embedding has collapsed: its uniformity where it is known, else the last layer's spread."""
    if geometry is not None and math.isnan(geometry.uniformity):
        return "some embeddings are zero and have no direction"
    if geometry is not None:
        near = geometry.uniformity > NEAR_ZERO
        return f"uniformity {geometry.uniformity:.2f}, near 0" if near else None
    last = float(cka.participation[-1])
    if not last < COLLAPSED:
        return None
    return f"{last:.2f} directions carry the variance of {cka.layers[-1]} (as they do in a classifier of two classes)"


def _verdict(found: RegionSet, supported: Sequence[Region]) -> str:
    if supported:
        best = supported[0]
        which = "the only co-adapted run" if len(supported) == 1 else f"the strongest deep run of {len(supported)}"
        return f"{best.layers[0]} to {best.layers[-1]} is {which}"
    if any(region.distinct for region in found.regions):
        return "the runs that stand out do so before training as well, so training did not make them"
    if any(caution.code == "LL003" for caution in found.cautions):
        return "there are too few samples or batches to tell a region from chance"
    return "no run of layers stands out from its neighbours beyond chance"
