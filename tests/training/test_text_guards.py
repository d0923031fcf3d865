"""What a run over sentences takes from its model, and what it refuses to start from."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from sentences import Corpus, make_corpus, write_csv

from layerlens.activations import features
from layerlens.encoders import build_encoder, train_tokenizer
from layerlens.errors import CheckpointError, ConfigError
from layerlens.tokens import token_batches
from layerlens.training.checkpoint import load_state, save_checkpoint
from layerlens.training.loop import load_dev, resolve, train
from layerlens.training.network import build_network, load_network


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoint(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    result = train(corpus.config({"max_length": 16}), folder, device="cpu")
    return folder / result.checkpoints[-1]


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ("", {}, ("cls-before-head", 32)),
        (",pooling=mean,max_length=12", {}, ("mean", 12)),
        (",pooling=mean,max_length=12", {"pooling": "cls", "max_length": 20}, ("cls", 20)),
    ],
)
def test_settings_go_before_the_models_own_and_these_before_simcses(
    options: str, text: dict[str, object], expected: tuple[str, int], corpus: Corpus
):
    config = corpus.config({"max_length": None, **text}, model=corpus.model(options))
    resolved = resolve(config, corpus.data())
    assert resolved.text is not None
    assert (resolved.text.pooling, resolved.text.max_length) == expected
    network = build_network(config, corpus.data())
    assert (network.pooling, network.max_length) == expected
    assert (network.head is not None) == expected[0].startswith("cls")


def test_a_sentence_transformer_folder_keeps_its_pooling_and_length(corpus: Corpus, tmp_path: Path):
    made = build_encoder(corpus.model(), pooling="mean", max_length=11)
    made.save_sentence_transformer(tmp_path / "st")
    config = corpus.config({"max_length": None}, model=f"hf:{tmp_path / 'st'}")
    network = build_network(config, corpus.data())
    assert (network.pooling, network.max_length, network.head) == ("mean", 11, None)
    assert torch.equal(network.embed(["a bird sings"]), made.embed(["a bird sings"]))


@pytest.mark.parametrize(
    "damage",
    [
        {"config": {"num_hidden_layers": 10**7}}, {"config": {"vocab_size": 10**9}},
        {"config": {"intermediate_size": 10**9}}, {"head": [10**6, 10**6]},
    ],
)  # fmt: skip
def test_a_file_that_describes_more_than_it_holds_is_refused_at_once(
    damage: dict[str, object], checkpoint: Path, tmp_path: Path
):
    state, metadata = load_state(checkpoint)
    encoder = metadata["encoder"]
    own = damage.get("config")
    changed = {**encoder, **damage, "config": {**encoder["config"], **(own if isinstance(own, dict) else {})}}
    network, _ = load_network(checkpoint)
    save_checkpoint(tmp_path / "damaged.safetensors", network, {**metadata, "encoder": changed})
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="describes a larger encoder than it holds"):
        load_network(tmp_path / "damaged.safetensors")
    assert time.monotonic() - begin < 5
    assert len(state) > 10


def test_a_checkpoint_with_other_tokens_is_no_start(checkpoint: Path, corpus: Corpus, tmp_path: Path):
    train_tokenizer(["quite other words than those"] * 3, tmp_path / "tokenizer", vocabulary=300)
    other = corpus.model().replace(str(corpus.tokenizer), str(tmp_path / "tokenizer"))
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        train(corpus.config(model=other, init=str(checkpoint)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_its_own_model(checkpoint: Path, corpus: Corpus):
    with pytest.raises(CheckpointError, match="holds its own encoder"):
        load_network(checkpoint, model=corpus.model(",pooling=mean"))
    assert load_network(checkpoint, model=corpus.model())[0].pooling == "cls-before-head"


def test_of_a_file_with_splits_the_dev_rows_choose(tmp_path: Path):
    rows = [("test", 1, "a", "b"), ("test", 2, "c", "d"), ("dev", 3, "e", "f"), ("dev", 4, "g", "h")]
    path = write_csv(tmp_path / "all.csv", ["split", "score", "sentence1", "sentence2"], rows)
    assert load_dev(f"sts:{path}").tasks[0].scores == (3.0, 4.0)
    assert load_dev(f"sts:{path},split=test").tasks[0].scores == (1.0, 2.0)


def test_masked_lm_needs_a_mask_token(corpus: Corpus, tmp_path: Path):
    for file in corpus.tokenizer.iterdir():
        text = file.read_text()
        if file.name != "tokenizer.json":
            text = json.dumps({k: v for k, v in json.loads(text).items() if k != "mask_token"})
        (tmp_path / file.name).write_text(text)
    model = corpus.model().replace(str(corpus.tokenizer), str(tmp_path))
    assert build_encoder(model).mlm_head is None
    with pytest.raises(ConfigError, match="no mask token"):
        build_encoder(model, mlm=True)


def test_features_of_a_block_are_means_over_tokens_whatever_the_batches(corpus: Corpus):
    encoder, data = build_encoder(corpus.model()), corpus.data()
    layer = "backbone.encoder.layer.0"
    small, large = (features(encoder, token_batches(encoder, data, batch_size=size), layer) for size in (4, 20))
    assert small.shape == (len(data.test), 16)
    torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-5)


def test_a_pooling_that_no_encoder_has_is_refused_in_words(corpus: Corpus):
    config = corpus.config({"max_length": None}, model=corpus.model(",pooling=max"))
    with pytest.raises(ConfigError, match=r"pooling='max' is unknown; .*set it in \[text\]"):
        resolve(config, corpus.data())
