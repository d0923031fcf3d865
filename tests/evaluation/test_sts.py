"""Spearman on scored pairs, alignment and uniformity of sentences: against another library, and by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sentences import Corpus, cosines, make_corpus, spearman, write_csv
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from layerlens.data import load_data
from layerlens.encoders import SentenceEncoder, build_encoder
from layerlens.errors import ConfigError, DegenerateError
from layerlens.evaluation.sts import sts_scores, text_geometry
from layerlens.pipeline import Settings, evaluate, measure_geometry
from layerlens.text import StsTask


class Places:
    """Stands for an encoder: each sentence is where the table says."""

    def __init__(self, where: dict[str, list[float]]) -> None:
        self.where = where

    def embed(self, sentences: Sequence[str]) -> Tensor:
        return torch.tensor([self.where[s] for s in sentences], dtype=torch.float32)


def angles(degrees: dict[str, float]) -> Places:
    """Sentences on a circle, at different distances from its middle."""
    return Places({s: [(2 + i) * math.cos(math.radians(a)), (2 + i) * math.sin(math.radians(a))]
                   for i, (s, a) in enumerate(degrees.items())})  # fmt: skip


def against(others: dict[str, float], scores: Sequence[float], name: str = "task") -> tuple[Places, StsTask]:
    """Pairs of `zero` at 0 degrees and others at theirs, with scores."""
    task = StsTask(name=name, first=("zero",) * len(others), second=tuple(others), scores=tuple(scores))
    return angles({"zero": 0.0, **others}), task


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def encoder(corpus: Corpus) -> SentenceEncoder:
    torch.manual_seed(0)
    return build_encoder(corpus.model(",pooling=mean"))


# --- Spearman ---


def test_it_is_what_sentence_transformers_evaluator_finds(corpus: Corpus, encoder: SentenceEncoder, tmp_path: Path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    encoder.save_sentence_transformer(tmp_path / "folder")
    (task,) = corpus.data("sts").tasks
    options = {"main_similarity": "cosine", "similarity_fn_names": ["cosine"], "write_csv": False}
    oracle = EmbeddingSimilarityEvaluator(list(task.first), list(task.second), list(task.scores), **options)
    found = oracle(st.SentenceTransformer(str(tmp_path / "folder"), device="cpu"))
    assert sts_scores(encoder, [task])["dev"] == pytest.approx(found["spearman_cosine"], abs=1e-6)


def test_it_is_the_correlation_of_ranks(corpus: Corpus, encoder: SentenceEncoder):
    (task,) = corpus.data("sts").tasks
    found = sts_scores(encoder, [task])
    assert found == pytest.approx({"dev": spearman(encoder, task), "mean": spearman(encoder, task)}, abs=1e-9)
    assert 0.1 < found["dev"] < 0.99


def test_order_and_lengths_count_and_numbers_do_not():
    degrees = {"a": 10.0, "b": 20.0, "c": 70.0, "d": 150.0}
    for scores, expected in (([5, 4, 3, 0], 1.0), ([5, 0.2, 0.1, 0], 1.0), ([0, 3, 4, 5], -1.0), ([5, 3, 4, 0], 0.8)):
        assert sts_scores(*_one(against(degrees, scores)))["task"] == pytest.approx(expected)


def _one(made: tuple[Places, StsTask]) -> tuple[Places, list[StsTask]]:
    return made[0], [made[1]]


def test_ties_have_their_mean_rank():
    """Scores 5, 4, 4, 1 have the ranks 4, 2.5, 2.5, 1; cosines of 10, 20, 63, 63 degrees 4, 3, 1.5, 1.5."""
    places, task = against({"a": 10.0, "b": 20.0, "c": 0.0, "d": 0.0}, [5, 4, 4, 1])
    places.where |= {"c": [1.0, 2.0], "d": [1.0, -2.0]}
    a, b = (4 - 2.5, 0.0, 0.0, 1 - 2.5), (4 - 2.5, 3 - 2.5, 1.5 - 2.5, 1.5 - 2.5)
    by_hand = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    assert cosines(places, task)[2] == cosines(places, task)[3] < cosines(places, task)[1]
    assert sts_scores(places, [task])["task"] == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx(spearman(places, task))


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subsets of a year: in each the order is right, but the second one's scores are all higher."""
    rows = [(2012, "one", 3, "zero", "a"), (2012, "one", 2, "zero", "b"), (2012, "one", 1, "zero", "c"),
            (2012, "two", 5, "zero", "d"), (2012, "two", 4.5, "zero", "e"), (2012, "two", 4, "zero", "f"),
            (2013, "one", 1, "zero", "a"), (2013, "one", 5, "zero", "f")]  # fmt: skip
    return write_csv(
        tmp_path_factory.mktemp("years") / "sts.csv", ["year", "subset", "score", "sentence1", "sentence2"], rows
    )


def test_a_years_subsets_are_ranked_together(year: Path):
    """The `all` setting; the mean over subsets would be 1."""
    tasks = load_data(f"sts:{year}").tasks  # type: ignore[union-attr]
    assert [task.name for task in tasks] == ["STS12", "STS13"]
    places = angles({"zero": 0.0, "a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0, "e": 50.0, "f": 60.0})
    found = sts_scores(places, tasks)
    # gold ranks 3 2 1 6 5 4, cosine ranks 6 5 4 3 2 1: 1 - 6 · (9 + 9 + 9 + 9 + 9 + 9) / (6 · 35)
    assert found["STS12"] == pytest.approx(1 - 6 * 54 / 210)
    assert found["STS13"] == pytest.approx(-1.0)
    assert found["mean"] == pytest.approx((found["STS12"] - 1) / 2)


def test_equal_sentences_make_equal_cosines_wherever_they_stand(encoder: SentenceEncoder):
    first, second = ("a bird sings", "nobody waits", "a bird sings"), ("nobody waits", "a bird sings", "a bird waits")
    task = StsTask(name="t", first=first, second=second, scores=(1.0, 5.0, 3.0))
    assert sts_scores(encoder, [task])["t"] == pytest.approx(spearman(encoder, task), abs=1e-9) == 0


def test_without_a_task_there_is_nothing_to_score(encoder: SentenceEncoder):
    with pytest.raises(ConfigError, match="no scored pairs of sentences; give sts:PATH"):
        sts_scores(encoder, [])


@pytest.mark.parametrize("where", [[1.0, 2.0], [0.0, 0.0]])
def test_constant_embeddings_rank_nothing(where: list[float]):
    task = StsTask(name="STS-B", first=("a", "b"), second=("c", "a"), scores=(1.0, 3.0))
    with pytest.raises(DegenerateError, match="STS-B: all 2 pairs have the same cosine"):
        sts_scores(Places(dict.fromkeys("abc", where)), [task])


def test_embeddings_that_are_constant_but_for_rounding_rank_nothing():
    """A collapsed encoder: all of one direction, at lengths whose quotients are rounded."""
    places = Places({s: [0.1 * k, 0.3 * k, 0.7 * k] for k, s in enumerate("abcdefgh", 1)})
    task = StsTask(name="t", first=tuple("abcdefg"), second=tuple("bcdefgh"), scores=(1, 2, 3, 4, 5, 4.5, 3.5))
    with pytest.raises(DegenerateError, match="same cosine"):
        sts_scores(places, [task])


def test_a_single_pair_ranks_nothing():
    places, task = against({"a": 10.0}, [3])
    with pytest.raises(DegenerateError, match="task"):
        sts_scores(places, [task])


def test_scores_that_are_all_equal_rank_nothing():
    places, task = against({"a": 10.0, "b": 20.0, "c": 30.0}, [3, 3, 3])
    with pytest.raises(DegenerateError, match="task"):
        sts_scores(places, [task])


def test_an_embedding_that_is_not_finite_is_no_score(encoder: SentenceEncoder):
    places, task = against({"a": 10.0, "b": 20.0, "c": 30.0}, [3, 2, 1])
    places.where["b"] = [math.nan, 1.0]
    with pytest.raises(ValueError, match=r"task|NaN|finite"):
        sts_scores(places, [task])


# --- alignment and uniformity ---


def unit(values: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def squared(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(unit(a), unit(b), strict=True))


def by_definition(places: Places, tasks: Sequence[StsTask]) -> tuple[float, float]:
    close = [
        squared(places.where[a], places.where[b])
        for task in tasks
        for a, b, score in zip(task.first, task.second, task.scores, strict=True)
        if score > 4
    ]
    known = sorted({s for task in tasks for s in (*task.first, *task.second)})
    pairs = [(a, b) for a in known for b in known if a < b]
    spread = [math.exp(-2 * squared(places.where[a], places.where[b])) for a, b in pairs]
    return sum(close) / len(close), math.log(sum(spread) / len(spread))


def scattered() -> tuple[Places, list[StsTask]]:
    """Two tasks that share sentences; a score of exactly 4, and one above."""
    draws = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).tolist()
    places = Places(dict(zip("abcdef", draws, strict=True)))
    one = StsTask(name="one", first=("a", "a", "b"), second=("b", "c", "c"), scores=(5.0, 4.0, 1.0))
    other = StsTask(name="other", first=("d", "e", "a"), second=("e", "f", "b"), scores=(4.2, 0.0, 4.01))
    return places, [one, other]


def test_geometry_is_its_definition_in_loops():
    places, tasks = scattered()
    close, spread, count = text_geometry(places, tasks)
    assert (close, spread) == pytest.approx(by_definition(places, tasks), rel=1e-5)
    assert count == 6


def test_a_sentence_counts_once_for_the_uniformity():
    places, tasks = scattered()
    again = StsTask(name="again", first=("a",) * 5, second=("b",) * 5, scores=(0.0,) * 5)
    assert text_geometry(places, [*tasks, again]) == pytest.approx(text_geometry(places, tasks))


def test_a_score_of_exactly_4_is_no_positive_pair():
    places, _ = scattered()
    at = StsTask(name="t", first=("a", "c"), second=("b", "d"), scores=(4.0, 4.000001))
    assert text_geometry(places, [at])[0] == pytest.approx(squared(places.where["c"], places.where["d"]), rel=1e-5)


def test_without_scores_there_is_a_uniformity_and_no_alignment():
    places, tasks = scattered()
    close, spread, count = text_geometry(places, (), list("abcdef"))
    assert math.isnan(close)
    assert spread == pytest.approx(by_definition(places, tasks)[1], rel=1e-5)
    assert count == 6


def test_without_a_pair_alike_there_is_no_alignment():
    places, _ = scattered()
    apart = StsTask(name="t", first=("a", "b"), second=("c", "d"), scores=(3.0, 1.0))
    close, spread, _ = text_geometry(places, [apart])
    assert math.isnan(close)
    assert spread < 0


def test_a_zero_embedding_has_no_place_on_the_sphere():
    places, tasks = scattered()
    places.where["f"] = [0.0, 0.0, 0.0]
    close, spread, count = text_geometry(places, tasks)
    assert math.isnan(close)
    assert math.isnan(spread)
    assert count == 6


# --- through the pipeline ---


def test_the_pipeline_scores_and_measures_all_pairs_whatever_the_settings(corpus: Corpus, encoder: SentenceEncoder):
    data = corpus.data("sts")
    assert evaluate(encoder, data) == sts_scores(encoder, data.tasks)
    close, spread, count = text_geometry(encoder, data.tasks)
    found = measure_geometry(encoder, data, Settings(samples=5, batch_size=4))
    assert (found.alignment, found.uniformity, found.samples) == (close, spread, count)


def test_of_plain_sentences_the_geometry_takes_the_chosen_ones(corpus: Corpus, encoder: SentenceEncoder):
    found = measure_geometry(encoder, corpus.data(), Settings(samples=12, batch_size=4))
    assert found.samples == 12
    assert math.isnan(found.alignment)
    assert found.uniformity < 0


@pytest.mark.parametrize("option", [{"layer": "1"}, {"protocol": "moco"}])
def test_what_is_for_images_is_refused(option: dict[str, str], corpus: Corpus, encoder: SentenceEncoder):
    with pytest.raises(ConfigError, match="layer and protocol are for images"):
        evaluate(encoder, corpus.data("sts"), **option)  # type: ignore[arg-type]


def test_sentences_without_scores_are_refused(corpus: Corpus, encoder: SentenceEncoder):
    with pytest.raises(ConfigError, match="no scored pairs of sentences; give sts:PATH"):
        evaluate(encoder, corpus.data())


def test_real_pairs_have_the_tasks_of_the_papers(shared_data: Path, corpus: Corpus, encoder: SentenceEncoder):
    folder = shared_data / "text"
    if not folder.is_dir():
        pytest.skip(f"no text at {folder}")
    data = load_data(f"sts:{folder / 'stsb_dev.csv.gz'},split=all")
    (task,) = data.tasks  # type: ignore[union-attr]
    assert (task.name, len(task.scores)) == ("STS-B", 1500)
    part = StsTask(name="part", first=task.first[:50], second=task.second[:50], scores=task.scores[:50])
    assert sts_scores(encoder, [part])["part"] == pytest.approx(spearman(encoder, part), abs=1e-9)
