"""Semantic textual similarity: how well cosines follow people's scores, and where sentences lie on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerlens.analysis.geometry import alignment, uniformity
from layerlens.errors import ConfigError, DegenerateError, NonFiniteError
from layerlens.text import StsTask

ALIKE = 4.0  # score above which a pair is a positive one
SAME = 1e-6  # cosines of float32 embeddings that differ by less are equal


def sts_scores(encoder: Any, tasks: Sequence[StsTask]) -> dict[str, float]:
    """Spearman correlation between cosines and gold scores, per task over all of its pairs at once, and their mean.

    Args:
        encoder: A `SentenceEncoder`, or anything whose `embed(sentences)` gives (n, d).
        tasks: Scored pairs, see `load_data("sts:PATH")`.

    Returns:
        Task name -> correlation in [-1, 1], and `mean`.

    Raises:
        ConfigError: No task.
        DegenerateError: All cosines, or all scores, of a task are equal, so that nothing is ranked.
        NonFiniteError: NaN or infinity in an embedding.

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
    where = _embedded(encoder, tasks, sentences)
    known = list(where.values())
    pairs = [(a, b) for t in tasks for a, b, score in zip(t.first, t.second, t.scores, strict=True) if score > ALIKE]
    try:
        spread = uniformity(torch.stack(known))
        if not pairs:
            return float("nan"), spread, len(known)
        first, second = (torch.stack([where[s] for s in side]) for side in zip(*pairs, strict=True))
        return alignment(first, second), spread, len(known)
    except DegenerateError:
        return float("nan"), float("nan"), len(known)


def _embedded(encoder: Any, tasks: Sequence[StsTask], others: Sequence[str] = ()) -> dict[str, Tensor]:
    """The embedding of each distinct sentence of the tasks; of the others if there are no tasks."""
    sentences = list(dict.fromkeys(s for task in tasks for s in (*task.first, *task.second))) or list(others)
    found = encoder.embed(sentences)
    if not bool(torch.as_tensor(found).isfinite().all()):
        raise NonFiniteError("NaN or infinity in the embeddings of sentences; check the weights of the encoder")
    return dict(zip(sentences, found, strict=True))


def _spearman(task: StsTask, where: dict[str, Tensor]) -> float:
    from scipy.stats import spearmanr

    first, second = (torch.stack([where[s] for s in side]).double() for side in (task.first, task.second))
    cosines = F.cosine_similarity(first, second)
    if len(cosines) < 2 or float(cosines.max() - cosines.min()) < SAME:
        raise DegenerateError(f"{task.name}: all {len(cosines)} pairs have the same cosine, so nothing is ranked")
    if len(set(task.scores)) < 2:
        raise DegenerateError(f"{task.name}: all {len(cosines)} pairs have the same score, so nothing is ranked")
    return float(spearmanr(cosines.numpy(), task.scores).statistic)
