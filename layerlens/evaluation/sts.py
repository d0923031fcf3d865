"""Semantic textual similarity: how well cosines follow people's scores, and where sentences lie on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerlens.analysis.geometry import alignment, uniformity
from layerlens.errors import ConfigError, DegenerateError
from layerlens.text import StsTask

ALIKE = 4.0  # score above which a pair is a positive one


def sts_scores(encoder: Any, tasks: Sequence[StsTask]) -> dict[str, float]:
    """Spearman correlation between cosines and gold scores, per task over all of its pairs at once, and their mean.

    Args:
        encoder: A `SentenceEncoder`, or anything whose `embed(sentences)` gives (n, d).
        tasks: Scored pairs, see `load_data("sts:PATH")`.

    Returns:
        Task name -> correlation in [-1, 1], and `mean`.

    Raises:
        ConfigError: No task.
        DegenerateError: All cosines of a task are equal, so that nothing is ranked.

    Source:
        Gao, Yao, Chen 2021, arXiv:2104.08821, appendix B: one correlation over a year's subsets ("all")
    """
    if not tasks:
        raise ConfigError("no scored pairs of sentences; give sts:PATH, a csv with score, sentence1, sentence2")
    where = _embedded(encoder, tasks)
    scores = {task.name: _spearman(task, where) for task in tasks}
    return {**scores, "mean": sum(scores.values()) / len(tasks)}


def text_geometry(encoder: Any, tasks: Sequence[StsTask], sentences: Sequence[str] = ()) -> tuple[float, float, int]:
    """Alignment of the pairs that people find alike, and uniformity of all sentences.

    Args:
        encoder: As for `sts_scores`.
        tasks: Pairs scored above 4 count for the alignment, all of their distinct sentences for the uniformity.
        sentences: Used for the uniformity where there are no tasks.

    Returns:
        Alignment (NaN without such a pair), uniformity (NaN where an embedding is zero), and how many sentences.

    Source:
        Wang & Isola 2020, arXiv:2005.10242, on text as in Gao et al. 2021, arXiv:2104.08821, figure 3
    """
    known = list(dict.fromkeys(s for task in tasks for s in (*task.first, *task.second))) or list(sentences)
    where = dict(zip(known, encoder.embed(known), strict=True))
    pairs = [(a, b) for t in tasks for a, b, score in zip(t.first, t.second, t.scores, strict=True) if score > ALIKE]
    try:
        spread = uniformity(torch.stack([where[s] for s in known]))
        close = (
            alignment(*(torch.stack([where[s] for s in side]) for side in zip(*pairs, strict=True))) if pairs else None
        )
    except DegenerateError:
        return float("nan"), float("nan"), len(known)
    return float("nan") if close is None else close, spread, len(known)


def _embedded(encoder: Any, tasks: Sequence[StsTask]) -> dict[str, Tensor]:
    sentences = list(dict.fromkeys(s for task in tasks for s in (*task.first, *task.second)))
    return dict(zip(sentences, encoder.embed(sentences), strict=True))


def _spearman(task: StsTask, where: dict[str, Tensor]) -> float:
    from scipy.stats import spearmanr

    first, second = (torch.stack([where[s] for s in side]).double() for side in (task.first, task.second))
    cosines = F.cosine_similarity(first, second)
    if len(cosines) < 2 or bool((cosines == cosines[0]).all()):
        raise DegenerateError(f"{task.name}: all {len(cosines)} pairs have the same cosine, so nothing is ranked")
    return float(spearmanr(cosines.numpy(), task.scores).statistic)
