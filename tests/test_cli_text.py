"""The command line on sentences: from a text file to a report, and one line for each mistake."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentences import LAYERS, Corpus, make_corpus, spearman, write_csv
from test_cli_studies import made

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from layerlens import figures, recommendation
from layerlens.analysis.results import FilmStrip, SimilarityMatrix
from layerlens.cli import main
from layerlens.experiments import engines
from layerlens.recommendation import Recommendation, Target
from layerlens.training.network import load_network
from layerlens.trajectory import Trajectory

MODEL = "hf-config:bert-tiny,tokenizer=tokenizer,layers=2,width=16,heads=2"
HEADED = f"{MODEL},pooling=cls-before-head,head=true"
TEXT, PAIRS, STS = "text:sentences.txt", "pairs:pairs.csv", "sts:dev.csv"
LOOK = ["--samples", "20", "--batch-size", "5", "--device", "cpu"]
BEST, START, END = (f"run/checkpoints/{name}.safetensors" for name in ("best", "epoch-0000", "epoch-0002"))
STUDY = """
[base]
objective = "simcse"
model = "{model}"
data = "text:sentences.txt"
epochs = 1
batch_size = 32
train_samples = 64
keep_every = 1

[base.text]
dev = "sts:dev.csv"

[starts.pretrained]
objective = "mlm"

[[arms]]
name = "simcse"
baseline = true
start = "pretrained"

[[arms]]
name = "deep"
start = "pretrained"

[arms.settings.augment]
rate = 0.5

[arms.axes]
"augment.layer" = ["1", "2"]

[[figures]]
kind = "sweep"
name = "by_layer"
metric = "dev"
lines = ["arm"]

[measure]
samples = 20
batch_size = 5
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus and a finished run of ten steps; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("place")
    make_corpus(folder)
    words = ["train", "--objective", "simcse", "--model", MODEL, "--data", TEXT, "--dev", STS, "--dev-every", "3"]
    words += ["--epochs", "2", "--batch-size", "32", "--learning-rate", "5e-3", "--device", "cpu", "--out", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(words)
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in that folder, and leave the run and the corpus as they are."""
    monkeypatch.chdir(place)
    kept = [path for path in place.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in kept if "analysis" not in path.parts}
    yield
    assert {path: path.stat().st_mtime_ns for path in before} == before


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    left: Any = 0
    capsys.readouterr()
    try:
        main([str(word) for word in words])
    except SystemExit as done:
        left = done.code
    out, err = capsys.readouterr()
    assert left == code, (left, err)
    return out, err


def parsed(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What --json printed: JSON that any reader takes, without NaN or infinity."""

    def never(name: str) -> Any:
        raise AssertionError(f"{name} in JSON")

    return json.loads(said(capsys, *words, "--json")[0], parse_constant=never)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that answers a mistake; what was read of the sentences may have been said before."""
    out, err = said(capsys, *words, code=2)
    assert out == ""
    assert "Traceback" not in err
    rows = [line for line in err.split("\r")[-1].splitlines() if not line.startswith(("text:", "sts:", "pairs:"))]
    assert len(rows) == 1, rows
    assert rows[0].startswith("layerlens: ")
    return rows[0]


# --- end to end ---


def test_tokenizer_learns_from_sentences(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["tokenizer", "--vocabulary", 300, "--data"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert parsed(capsys, *words, TEXT, "--out", one) == {"folder": str(one), "sentences": 180}
    assert parsed(capsys, *words, PAIRS, "--out", two)["sentences"] == 54 * 3
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    found = parsed(capsys, "layers", MODEL.replace("tokenizer=tokenizer", f"tokenizer={tmp_path / 'one'}"))
    assert found[1]["kind"] == "Embedding"


@pytest.mark.parametrize(("model", "count"), [(MODEL, 3), (HEADED, 4)])
def test_layers_bear_the_papers_numbers(model: str, count: int, capsys: pytest.CaptureFixture[str]):
    rows = [row for row in parsed(capsys, "layers", model) if row["default"]]
    assert [(row["index"], row["name"]) for row in rows] == list(enumerate(LAYERS[:count]))


def test_train_says_what_it_read_and_ends_with_its_score(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["train", "--objective", "mlm", "--model", MODEL, "--data", TEXT, "--dev", STS, "--batch-size", 32]
    words += ["--pooling", "mean", "--max-length", 8, "--device", "cpu", "--out", tmp_path / "run"]
    out, err = said(capsys, *words)
    assert "text:sentences.txt: 200 sentences, 20 of them for tests" in err
    assert "sentences have more than 8 tokens and are cut there" in err
    assert out.splitlines()[0].split() == ["folder", "run", "epochs", "loss", "wall_s", "dev", "best"]
    row = parsed(capsys, *words)  # it is done already
    assert row["best"]["dev"] == row["dev"]
    assert row["best"]["step"] == 5
    network, _ = load_network(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert (network.pooling, network.max_length, network.mlm_head is not None) == ("mean", 8, True)


def test_cut_sentences_are_counted_right(capsys: pytest.CaptureFixture[str], tmp_path: Path, place: Path):
    words = ["train", "--objective", "simcse", "--model", MODEL, "--data", TEXT, "--batch-size", 64, "--device", "cpu"]
    _, err = said(capsys, *words, "--max-length", 10, "--out", tmp_path)
    encoder, _ = load_network(place / END)
    train = Corpus(place).data().split("train")
    encoder.max_length = 100
    long = sum(int(encoder.tokenize([s])["attention_mask"].sum()) > 10 for s in train)
    assert 0 < long < 180
    assert f"{long} sentences have more than 10 tokens" in err


def test_evaluate_gives_the_spearman_of_each_task(capsys: pytest.CaptureFixture[str], place: Path):
    row = parsed(capsys, "evaluate", "--checkpoint", BEST, "--data", STS, "--device", "cpu")
    network, metadata = load_network(place / BEST)
    (task,) = Corpus(place).data("sts").tasks
    assert row["dev"] == row["mean"] == pytest.approx(spearman(network, task), abs=1e-9)
    assert row["dev"] == pytest.approx(metadata["dev"], abs=1e-9)
    assert row["layer"] == "input of head"


def test_evaluate_takes_a_model_without_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    said(capsys, "export", END, "--out", tmp_path / "st")
    row = parsed(capsys, "evaluate", "--model", f"hf:{tmp_path / 'st'}", "--data", STS, "--device", "cpu")
    scored = parsed(capsys, "evaluate", "--checkpoint", END, "--data", STS, "--device", "cpu")
    assert row["dev"] == pytest.approx(scored["dev"], abs=1e-9)


def test_evaluate_run_scores_its_dev_pairs_at_each_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["evaluate", "--run", "run", "--out", tmp_path, "--device", "cpu"]
    found = Trajectory.from_json(json.dumps(parsed(capsys, *words)))
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in found.rows] == [0, 2]
    assert found.rows[-1]["dev"] == pytest.approx(metrics[-1]["dev"], abs=1e-9)
    assert {"alignment_test", "uniformity_test", "mean"} <= set(found.rows[0])
    assert (tmp_path / "scores.png").exists()


@pytest.mark.parametrize("data", [TEXT, STS, PAIRS])
def test_analyze_has_every_layer_and_no_nan(data: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    found = parsed(capsys, "analyze", "--checkpoint", END, "--data", data, *LOOK, "--out", tmp_path)
    assert found["cka"]["layers"] == list(LAYERS)
    assert (found["geometry"]["alignment"] is None) == (data != STS)
    assert math.isfinite(found["geometry"]["uniformity"])
    assert (tmp_path / "similarity.png").exists()


def test_analyze_prints_its_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out, _ = said(capsys, "analyze", "--checkpoint", END, "--data", TEXT, *LOOK, "--out", tmp_path)
    assert [line.split()[0] for line in out.splitlines()[1:5]] == list(LAYERS)
    assert "uniformity" in out
    assert "images" not in out


def test_recommend_answers_for_a_checkpoint_and_for_a_model(capsys: pytest.CaptureFixture[str]):
    for which in (["--checkpoint", END], ["--model", MODEL], ["--model", MODEL, "--no-twin"]):
        found = parsed(capsys, "recommend", *which, "--data", TEXT, *LOOK)
        assert found["verdict"] in ("supported", "no supported choice")
        assert found["samples"] == 20


def target(layer: str, stop: bool) -> Target:
    numbers = dict.fromkeys(("within", "outside", "contrast", "twin", "gain"), 0.5)
    return Target(rank=1, layer=layer, index=LAYERS.index(layer), stop_gradient=stop, reason="made up",
                  confidence=1.0, evidence=numbers)  # fmt: skip


def test_film_marks_what_each_later_checkpoint_recommends(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    advised, drawn = recommendation.recommend, []
    whole = figures.film_strip

    def advise(cka: SimilarityMatrix, baseline: SimilarityMatrix | None = None, **options: Any) -> Recommendation:
        found = advised(cka, baseline, **options)
        object.__setattr__(found, "targets", (target(LAYERS[1], True), target(LAYERS[2], False)))
        return found

    def film(strip: FilmStrip, **options: Any) -> Any:
        drawn.append((whole(strip, **{**options, "targets": ()}), whole(strip, **options)))
        return drawn[-1][1]

    monkeypatch.setattr(recommendation, "recommend", advise)
    monkeypatch.setattr(figures, "film_strip", film)
    found = parsed(capsys, "film", "run", *LOOK, "--out", tmp_path)
    assert len(found["frames"]) == 2
    assert (tmp_path / "film.png").exists()
    ((plain, marked),) = drawn
    for k, marks in ((0, set()), (1, {(1.0, 1.0), (2.0, 2.0)})):
        assert places(marked.axes[k]) - places(plain.axes[k]) == marks


def places(axes: Any) -> set[tuple[float, float]]:
    """Where points are drawn."""
    lines = [tuple(map(float, point)) for line in axes.lines for point in line.get_xydata()]
    dots = [tuple(map(float, point)) for dots in axes.collections for point in dots.get_offsets()]
    return {(point[0], point[1]) for point in (*lines, *dots)}


def test_compare_of_two_checkpoints_has_ones_on_its_diagonal_with_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    itself = parsed(capsys, "compare", END, END, "--data", TEXT, *LOOK, "--out", tmp_path / "same")
    assert [itself["values"][k][k] for k in range(4)] == pytest.approx([1.0] * 4)
    found = parsed(capsys, "compare", START, END, "--data", TEXT, *LOOK, "--out", tmp_path / "two")
    assert found["first"] == found["second"] == list(LAYERS)
    assert found["values"][3][3] < 0.999
    parsed(capsys, "compare", f"{MODEL},max_length=32", END, "--data", STS, *LOOK, "--out", tmp_path / "model")


def test_an_exported_folder_is_the_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, place: Path):
    st = pytest.importorskip("sentence_transformers")
    assert parsed(capsys, "export", END, "--out", tmp_path / "st")["pooling"] == "cls-before-head"
    sentences = list(Corpus(place).data().split("test"))
    theirs = st.SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(theirs, load_network(place / END)[0].embed(sentences), atol=1e-6, rtol=0)
    (row,) = parsed(capsys, "layers", f"hf:{tmp_path / 'st'}")[:1]
    assert row["name"] == "input"


def test_export_keeps_what_lies_there(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "exists; give a new or empty folder" in refused(capsys, "export", END, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def report(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run's report."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["report", "run", *LOOK, "--out", str(folder)])
    return folder


def test_a_report_tells_of_sentences(report: Path):
    page = (report / "report.html").read_text()
    assert "backbone.encoder.layer.1" in page
    assert "simcse" in page
    assert "text:sentences.txt" in page
    found = (report / "report.json").read_text()
    assert json.loads(found)
    assert "NaN" not in found


def test_a_report_on_sentences_speaks_of_no_images(report: Path):
    assert "images" not in (report / "report.html").read_text()


def test_a_study_on_sentences_runs_to_its_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engines, "make_engine", made)
    (tmp_path / "study.toml").write_text(STUDY.format(model=MODEL))
    words = ["study", "run", tmp_path / "study.toml", "--store", tmp_path / "store", "--device", "cpu"]
    found = parsed(capsys, *words)
    assert [row["arm"] for row in found["runs"]] == ["pretrained", "simcse", "deep", "deep"]
    assert list((tmp_path / "store").rglob("by_layer.png"))
    out, _ = said(capsys, *words)
    assert out.splitlines()[0].startswith("study: dev")
    assert "0 of them now" in out.splitlines()[-1]


# --- mistakes ---

TRAIN = ["train", "--device", "cpu", "--epochs", "1", "--batch-size", "32"]
WRONG: dict[str, tuple[list[str], str]] = {
    "images with simcse": (
        [*TRAIN, "--objective", "simcse", "--model", MODEL, "--data", "digits"],
        "objective='simcse' trains on sentences; digits has images. Use text:PATH or pairs:PATH",
    ),
    "text with simclr": (
        [*TRAIN, "--objective", "simclr", "--model", MODEL, "--data", TEXT],
        "objective='simclr' trains on images; text:sentences.txt has sentences. Use simcse, pairs or mlm",
    ),
    "single sentences with pairs": (
        [*TRAIN, "--objective", "pairs", "--model", MODEL, "--data", TEXT], "has single ones. Use pairs:PATH",
    ),
    "an image model": (
        [*TRAIN, "--objective", "simcse", "--model", "resnet20-cifar", "--data", TEXT],
        "model='resnet20-cifar' reads no sentences, which simcse trains on; give --model hf:PATH",
    ),
    "a missing model": (
        [*TRAIN, "--objective", "simcse", "--model", "hf:missing", "--data", TEXT],
        "no folder 'missing', and no model of that name in the local cache; where there is a network, `hf download",
    ),
    "no tokenizer": (
        [*TRAIN, "--objective", "simcse", "--model", "hf-config:bert-tiny", "--data", TEXT],
        "has no tokenizer; add ,tokenizer=FOLDER (`layerlens tokenizer` makes one from sentences)",
    ),
    "a size that is none": (
        [*TRAIN, "--objective", "simcse", "--model", "hf-config:bert-tinny,tokenizer=tokenizer", "--data", TEXT],
        "closest: bert-tiny",
    ),
    "no dropout": (
        [*TRAIN, "--objective", "simcse", "--model", MODEL, "--data", TEXT, "--model-dropout", "0"],
        "both views of a sentence are the same",
    ),
    "no such layer": (
        [*TRAIN, "--objective", "simcse", "--model", MODEL, "--data", TEXT, "--augment-layer", "9"],
        "no layer number 9 in SentenceEncoder; allowed: -1 to 3",
    ),
    "no file": (
        [*TRAIN, "--objective", "simcse", "--model", MODEL, "--data", "text:nowhere.txt"], "is not there; text:PATH",
    ),
    "too long": (
        [*TRAIN, "--objective", "simcse", "--model", MODEL, "--data", TEXT, "--max-length", "1000"],
        "max_length=1000; allowed: 3 to 512 tokens",
    ),
    "mlm weight of mlm": (
        [*TRAIN, "--objective", "mlm", "--model", MODEL, "--data", TEXT, "--mlm-weight", "0.1"], "goes with simcse",
    ),
    "dev-every alone": (
        [*TRAIN, "--objective", "simcse", "--model", MODEL, "--data", TEXT, "--dev-every", "3"],
        "dev_every=3 without text.dev; say on which sts:PATH",
    ),
    "evaluate without scores": (
        ["evaluate", "--checkpoint", BEST, "--data", TEXT], "no scored pairs of sentences; give sts:PATH",
    ),
    "evaluate images": (["evaluate", "--checkpoint", BEST, "--data", "digits"], "reads sentences; digits holds images"),
    "evaluate a layer": (["evaluate", "--checkpoint", BEST, "--data", STS, "--layer", "1"], "are for images"),
    "fine-tune": (["evaluate", "--checkpoint", BEST, "--data", STS, "--finetune", "1"], "--finetune are for images"),
    "analyze images": (["analyze", "--model", MODEL, "--data", "digits"], "reads sentences; digits holds images"),
    "analyze with an image model": (
        ["analyze", "--model", "resnet20-cifar", "--data", TEXT], "reads no sentences, which is what text:",
    ),
    "recommend images": (["recommend", "--model", MODEL, "--data", "digits"], "reads sentences; digits holds images"),
    "recommend with an image model": (
        ["recommend", "--model", "resnet20-cifar", "--data", TEXT], "reads no sentences, which is what text:",
    ),
    "compare with an image model": (
        ["compare", MODEL, "resnet20-cifar", "--data", TEXT, "--out", "nowhere"], "reads no sentences",
    ),
    "compare on images": (["compare", MODEL, MODEL, "--data", "digits", "--out", "nowhere"], "digits holds images"),
    "tokenizer of too few": (
        ["tokenizer", "--data", TEXT, "--vocabulary", "10", "--out", "nowhere"], "vocabulary=10; allowed: from",
    ),
    "export of nothing": (["export", "nothing.safetensors", "--out", "nowhere"], "no checkpoint 'nothing.safetensors'"),
    "export of a run": (["export", "run", "--out", "nowhere"], "no checkpoint 'run'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_one_line_and_writes_nothing(kind: str, capsys: pytest.CaptureFixture[str]):
    words, message = WRONG[kind]
    before = set(Path().rglob("*"))
    assert message in refused(capsys, *words)
    assert set(Path().rglob("*")) == before


CONFIG = 'objective = "simcse"\nmodel = "{model}"\ndata = "text:sentences.txt"\n'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[adalase]\n", "[adalase] with objective='simcse'; it is for images"),
        ("[views]\nflip = 0.5\n", "[views] with objective='simcse'; it is for images"),
        ("input_augment = 'mixup'\n", "input_augment='mixup' with objective='simcse'; it is for images"),
        ("channels_last = true\n", "channels_last=true with objective='simcse'; it is for images"),
        ('text = "mean"\n', "text='mean'"),
        ("[text]\npoling = 'mean'\n", "pooling"),
    ],
)
def test_a_file_with_settings_for_images_is_refused(
    more: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "run.toml").write_text(CONFIG.format(model=MODEL) + more)
    assert message in refused(capsys, "train", "--config", tmp_path / "run.toml", "--device", "cpu")


def config_folder(folder: Path, tokenizer: bool = True, **content: Any) -> Path:
    """A model's folder with a configuration, and perhaps a tokenizer."""
    if tokenizer:
        shutil.copytree("tokenizer", folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_an_encoder_decoder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = config_folder(tmp_path / "t5", model_type="t5", d_model=16, num_layers=1)
    for words in (["layers", f"hf-config:{folder}"],
                  [*TRAIN, "--objective", "simcse", "--model", f"hf:{folder}", "--data", TEXT]):  # fmt: skip
        assert "t5 is an encoder-decoder; allowed: encoders (BERT and the like)" in refused(capsys, *words)


def test_a_decoder_takes_the_mean_and_refuses_the_first_token(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = config_folder(tmp_path / "gpt2", model_type="gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=64)
    words = [*TRAIN, "--objective", "simcse", "--model", f"hf-config:{folder}", "--data", TEXT]
    assert "a decoder, the first token sees only itself; allowed: mean" in refused(capsys, *words)
    row = parsed(capsys, *words, "--pooling", "mean", "--out", tmp_path / "run")
    assert row["loss"] > 0


@pytest.mark.parametrize("extra", [["--objective", "mlm"], ["--objective", "simcse", "--mlm-weight", "0.1"]])
def test_mlm_of_a_model_without_that_head_is_refused(
    extra: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    said(capsys, "export", END, "--out", tmp_path / "st")  # weights of the Transformer alone
    words = [*TRAIN, *extra, "--model", f"hf:{tmp_path / 'st'}", "--data", TEXT]
    assert "has no weights for its masked-language-model head" in refused(capsys, *words)
    gpt = config_folder(tmp_path / "gpt2", model_type="gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=64)
    words = [*TRAIN, *extra, "--pooling", "mean", "--model", f"hf-config:{gpt}", "--data", TEXT]
    assert "gpt2 has no masked-language-model head" in refused(capsys, *words)


def test_a_folder_without_a_tokenizer_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = config_folder(tmp_path / "bare", tokenizer=False, model_type="bert", hidden_size=16)
    assert "no tokenizer in" in refused(capsys, "layers", f"hf-config:{folder}")


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["score", "sentence1", "sentence2"], [7, "a", "b"], "line 2: score '7'; allowed: numbers from 0 to 5"),
        (["score", "sentence1", "sentence2"], [-0.1, "a", "b"], "score '-0.1'; allowed: numbers from 0 to 5"),
        (["score", "sentence1", "sentence2"], ["nan", "a", "b"], "score 'nan'; allowed"),
        (["sentence1", "sentence2"], ["a", "b"], "lacks the columns score or relatedness; it has sentence1, sentence2"),
        (["score", "sentence1"], [3, "b"], "lacks the columns sentence2"),
        (["score", "sentence1", "sentence2"], [3, "", "b"], "has no pair of sentences, both with text"),
    ],
)
def test_a_damaged_file_of_scores_is_named_with_its_line(
    header: list[str], row: list[Any], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    path = write_csv(tmp_path / "bad.csv", header, [row])
    train = [*TRAIN, "--objective", "simcse", "--model", MODEL, "--data", TEXT, "--dev", f"sts:{path}"]
    for words in (["evaluate", "--checkpoint", BEST, "--data", f"sts:{path}"], train):
        assert message in refused(capsys, *words)


def test_what_is_left_out_of_a_text_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    good = Path("sentences.txt").read_bytes().splitlines()[:60]
    (tmp_path / "odd.txt").write_bytes(b"\n".join([*good, b"", b"  ", b"caf\xe9", b"nul\0"]))
    words = [*TRAIN, "--objective", "simcse", "--model", MODEL, "--out", tmp_path / "run", "--data"]
    _, err = said(capsys, *words, f"text:{tmp_path / 'odd.txt'}")
    assert "60 sentences, 6 of them for tests; left out: 2 empty, 1 invalid UTF-8, 1 with NUL bytes" in err


def test_models_that_cut_into_other_tokens_are_not_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    said(capsys, "tokenizer", "--data", PAIRS, "--vocabulary", 100, "--out", tmp_path / "other")
    other = MODEL.replace("tokenizer=tokenizer", f"tokenizer={tmp_path / 'other'}")
    words = ["compare", MODEL, other, "--data", TEXT, *LOOK, "--out", tmp_path / "out"]
    assert "the two models cut sentences into different tokens" in refused(capsys, *words)


# --- what once read badly ---


def test_tokenizer_of_images_says_what_it_takes(capsys: pytest.CaptureFixture[str]):
    assert "text:PATH" in refused(capsys, "tokenizer", "--data", "digits", "--out", "nowhere")


def test_simcse_without_a_model_asks_for_one(capsys: pytest.CaptureFixture[str]):
    assert "--model" in refused(capsys, *TRAIN, "--objective", "simcse", "--data", TEXT)


def test_an_encoder_on_images_is_refused_in_words(capsys: pytest.CaptureFixture[str]):
    line = refused(capsys, *TRAIN, "--objective", "simclr", "--model", MODEL, "--data", "digits")
    assert "positional argument" not in line


@pytest.mark.parametrize(
    "words",
    [["layers", MODEL, "--input-shape", "3,32,32"], ["evaluate", "--checkpoint", BEST, "--data", STS, "-k", "5"]],
)
def test_options_for_images_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    refused(capsys, *words)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_scores_that_are_all_equal_are_refused_in_a_line(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    rows = [(3, "a bird sings", "nobody waits"), (3, "a bird waits", "the old king sings")]
    data = f"sts:{write_csv(tmp_path / 'equal.csv', ['score', 'sentence1', 'sentence2'], rows)}"
    train = [
        *TRAIN,
        "--objective",
        "simcse",
        "--model",
        MODEL,
        "--data",
        TEXT,
        "--dev",
        data,
        "--out",
        tmp_path / "run",
    ]
    score = ["evaluate", "--checkpoint", BEST, "--data", data, "--device", "cpu", "--json"]
    refused(capsys, *(train if command == "train" else score))


def test_models_that_read_other_lengths_are_told_so(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    line = refused(capsys, "compare", MODEL, END, "--data", TEXT, *LOOK, "--out", tmp_path / "out")
    assert "max_length" in line
