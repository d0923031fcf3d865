"""Training on sentences: what each objective sees, what is transformed, and that nothing but the settings counts."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from sentences import LAYERS, Corpus, make_corpus, sentence, spearman, write_csv
from test_resume import interrupt_at, lines, same
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from layerlens.augment.deep import DeepAugmentation
from layerlens.errors import CheckpointError, ConfigError, LayerlensError, UnknownLayerError
from layerlens.training import feeds, loop
from layerlens.training.checkpoint import load_state, save_checkpoint
from layerlens.training.config import RunConfig, make_config
from layerlens.training.feeds import TextFeed
from layerlens.training.launch import launch
from layerlens.training.loop import train
from layerlens.training.network import augmented_layers, build_network, build_start, load_network
from layerlens.training.recipes import list_recipes, recipe_text
from layerlens.training.schedule import learning_rate

STEPS = 5  # of an epoch of `Corpus.config`
DEEP = {"layer": "1", "stop_gradient": True, "fraction": 0.5, "rate": 0.5}
RICH: dict[str, Any] = {"augment": DEEP, "epochs": 2, "schedule": "linear", "warmup_epochs": 0.2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def trainer_of(chosen: RunConfig, folder: Path, **options: Any) -> Any:
    """What `train` runs, before it runs."""
    data = loop.load_data(chosen.data)
    return loop._Trainer(loop.resolve(chosen, data), data, folder, "cpu", options.get("progress"))


def run(chosen: RunConfig, folder: Path, **options: Any) -> Any:
    return train(chosen, folder, device="cpu", **options)


@pytest.fixture(scope="module")
def pretrained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of an MLM run."""
    folder = tmp_path_factory.mktemp("mlm")
    return folder / run(corpus.config(objective="mlm", seed=3), folder).checkpoints[-1]


def first_step(chosen: RunConfig, folder: Path) -> tuple[Any, list[dict[str, Any]], float]:
    """A run of one step: its trainer, what went into its network and came out in each pass, and the loss it logged."""
    trainer = trainer_of(chosen.model_copy(update={"train_samples": chosen.batch_size, "epochs": 1}), folder)
    passes: list[dict[str, Any]] = []

    def keep(_module: Any, _args: Any, inputs: dict[str, Tensor], output: Tensor) -> None:
        passes.append({**{k: v.clone() for k, v in inputs.items()}, "output": output.detach().clone()})

    trainer.network.register_forward_hook(keep, with_kwargs=True)
    trainer.run()
    (metrics,) = lines(folder, "metrics")
    return trainer, passes, metrics["loss"]


def read(trainer: Any, column: int = 0) -> list[str]:
    """The sentences of the only step of a run, in order."""
    (rows,) = trainer.order.epoch(0)
    return [trainer.feed.dataset.row(int(row))[column] for row in rows.flatten()]


def tokens_of(trainer: Any, sentences: list[str]) -> list[list[int]]:
    """Token ids, a sentence at a time: no padding."""
    return [trainer.network.tokenize([s])["input_ids"][0].tolist() for s in sentences]


def unpadded(found: dict[str, Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]


def contrastive(z: Tensor, columns: int, temperature: float = 0.05) -> float:
    """SimCSE's equation, one number at a time."""
    n, rows = len(z) // columns, [row / row.norm() for row in z.double()]
    total = 0.0
    for i in range(n):
        scores = [math.exp(float(rows[i] @ rows[j]) / temperature) for j in range(n, columns * n)]
        total -= math.log(scores[i] / sum(scores))
    return total / n


def weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Of every checkpoint, the best one too."""
    return {path.name: load_state(path)[0] for path in sorted((folder / "checkpoints").glob("*.safetensors"))}


def assert_alike(found: Path, expected: Path) -> None:
    """Two finished runs differ in nothing but their clocks."""
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert same(ours[name], theirs[name]), name
    for name in ("metrics", "dev"):
        assert lines(found, name) == lines(expected, name)
    results = [json.loads((folder / "result.json").read_text()) for folder in (found, expected)]
    facts = ("run", "epochs", "loss", "knn", "dev", "best", "checkpoints")
    assert [results[0][key] for key in facts] == [results[1][key] for key in facts]


# --- what a step sees, and its loss ---


def test_simcse_sees_the_same_sentences_twice(corpus: Corpus, tmp_path: Path):
    trainer, (seen,), _ = first_step(corpus.config(), tmp_path)
    expected = tokens_of(trainer, read(trainer))
    assert unpadded(seen) == expected * 2
    assert len({tuple(ids) for ids in expected}) == 32


def test_pairs_come_column_after_column_and_hard_negatives_third(corpus: Corpus, tmp_path: Path):
    trainer, (seen,), _ = first_step(corpus.config(objective="pairs", batch_size=16), tmp_path)
    columns = [tokens_of(trainer, read(trainer, k)) for k in range(3)]
    assert unpadded(seen) == columns[0] + columns[1] + columns[2]
    assert columns[0] != columns[1] != columns[2]


@pytest.mark.parametrize(("objective", "columns"), [("simcse", 2), ("pairs", 3)])
def test_the_logged_loss_is_the_equation_of_the_networks_outputs(
    objective: str, columns: int, corpus: Corpus, tmp_path: Path
):
    _, (seen,), loss = first_step(corpus.config(objective=objective, batch_size=16), tmp_path)
    assert seen["output"].shape == (16 * columns, 16)
    assert loss == pytest.approx(contrastive(seen["output"], columns), rel=1e-5)


def test_the_two_views_differ_by_the_models_dropout_alone(corpus: Corpus, tmp_path: Path):
    _, (seen,), _ = first_step(corpus.config({"pooling": "mean"}), tmp_path)
    one, other = seen["output"].chunk(2)
    assert not torch.equal(one, other)
    assert torch.nn.functional.cosine_similarity(one, other).min() > 0.5


def test_temperature_and_scale_reach_the_loss(corpus: Corpus, tmp_path: Path):
    _, (seen,), loss = first_step(corpus.config(temperature=0.5, loss_scale=3.0), tmp_path)
    assert loss == pytest.approx(3 * contrastive(seen["output"], 2, temperature=0.5), rel=1e-5)


def bert_loss(trainer: Any, start: dict[str, Tensor], seen: dict[str, Any], originals: Tensor) -> float:
    """transformers' own masked language model, with the run's first weights and -100 where nothing is asked."""
    from transformers import BertForMaskedLM

    oracle = BertForMaskedLM(trainer.network.config).eval()
    state = {name.replace("backbone.", "bert.", 1): value for name, value in start.items() if name[:9] == "backbone."}
    state |= {name.removeprefix("mlm_head."): value for name, value in start.items() if name[:9] == "mlm_head."}
    odd = oracle.load_state_dict({k: v for k, v in state.items() if k in oracle.state_dict()}, strict=False)
    assert set(odd.missing_keys) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}  # tied
    oracle.tie_weights()
    labels = torch.where(seen["positions"], originals, -100)
    with torch.no_grad():
        out = oracle(input_ids=seen["input_ids"], attention_mask=seen["attention_mask"], labels=labels)
    return float(out.loss)


def test_the_mlm_loss_is_that_of_transformers(corpus: Corpus, tmp_path: Path):
    chosen = corpus.config({"model_dropout": 0.0, "mlm_share": 0.3}, objective="mlm")
    trainer, (seen,), loss = first_step(chosen, tmp_path)
    originals = trainer.network.tokenize(read(trainer))["input_ids"]
    start = weights(tmp_path)["epoch-0000.safetensors"]
    assert loss == pytest.approx(bert_loss(trainer, start, seen, originals), rel=1e-5)
    assert torch.equal(seen["input_ids"][~seen["positions"]], originals[~seen["positions"]])
    special = torch.isin(originals, torch.tensor(trainer.network.tokenizer.all_special_ids))
    assert not (seen["positions"] & special).any()
    assert 0.2 < seen["positions"].sum() / (~special).sum() < 0.4


def test_simcse_adds_the_weighted_mlm_loss_of_the_same_sentences(corpus: Corpus, tmp_path: Path):
    augment = {"layer": "0", "fraction": 0.0}  # transforms nothing, so that no draw stands between us and the oracle
    chosen = corpus.config({"model_dropout": 0.0, "mlm_weight": 0.7}, augment=augment)
    trainer, (plain, masked), loss = first_step(chosen, tmp_path)
    assert torch.equal(plain["input_ids"][~masked["positions"]], masked["input_ids"][~masked["positions"]])
    start = weights(tmp_path)["epoch-0000.safetensors"]
    expected = contrastive(plain["output"], 2) + 0.7 * bert_loss(trainer, start, masked, plain["input_ids"])
    assert loss == pytest.approx(expected, rel=1e-5)
    first, second = masked["positions"].chunk(2)
    assert not torch.equal(first, second)  # the two copies of a sentence hide other words


def test_the_mlm_head_and_the_embeddings_stay_one_matrix(corpus: Corpus, tmp_path: Path):
    trainer, _, _ = first_step(corpus.config(objective="mlm"), tmp_path)
    decoder = trainer.network.mlm_head.get_output_embeddings()
    table = trainer.network.backbone.get_input_embeddings()
    assert decoder.weight.data_ptr() == table.weight.data_ptr()
    start = weights(tmp_path)["epoch-0000.safetensors"]["backbone.embeddings.word_embeddings.weight"]
    assert not torch.equal(table.weight, start)
    loaded, _ = load_network(tmp_path / "checkpoints" / "epoch-0001.safetensors")
    assert torch.equal(loaded.mlm_head.get_output_embeddings().weight, table.weight)


def test_the_objectives_lower_their_loss(corpus: Corpus, tmp_path: Path):
    for objective in ("simcse", "pairs", "mlm"):
        chosen = corpus.config({"pooling": "mean"}, objective=objective, epochs=2, learning_rate=2e-2, batch_size=8)
        run(chosen, tmp_path / objective)
        losses = [line["loss"] for line in lines(tmp_path / objective, "metrics")]
        assert losses[-1] < 0.9 * losses[0], (objective, losses)


# --- Deep Augmentation ---


@pytest.fixture
def augmented(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What DeepAugmentation.augment got and gave, of the training steps alone, in order."""
    calls: list[dict[str, Tensor]] = []
    whole = DeepAugmentation.augment

    def augment(self: DeepAugmentation, h: Tensor, mask: Tensor | None = None) -> Tensor:
        if h.requires_grad:
            h.retain_grad()
        changed = whole(self, h, mask)
        if torch.is_grad_enabled():
            calls.append({"h": h, "mask": mask, "changed": changed})
        return changed

    monkeypatch.setattr(DeepAugmentation, "augment", augment)
    return calls


def touched(call: dict[str, Tensor]) -> Tensor:
    """Which samples were transformed, shape (n,)."""
    return (call["changed"] != call["h"]).flatten(1).any(1)


def test_each_pass_is_transformed_anew(corpus: Corpus, tmp_path: Path, augmented: list[dict[str, Tensor]]):
    chosen = corpus.config({"mlm_weight": 0.1}, augment=DEEP)
    _, passes, _ = first_step(chosen, tmp_path)
    assert len(passes) == len(augmented) == 2
    for seen, call in zip(passes, augmented, strict=True):
        assert torch.equal(call["mask"], seen["attention_mask"])
        assert 10 < touched(call).sum() < 54  # of 64
        padding = ~call["mask"].bool()
        assert padding.any()
        assert torch.equal(call["changed"][padding], call["h"][padding])
    assert not torch.equal(touched(augmented[0]), touched(augmented[1]))
    both = touched(augmented[0]) & touched(augmented[1])
    dropped = [call["changed"][both] == 0 for call in augmented]
    assert not torch.equal(*dropped)


def test_one_of_each_pair_is_transformed_and_another_in_the_mlm_pass(
    corpus: Corpus, tmp_path: Path, augmented: list[dict[str, Tensor]]
):
    first_step(corpus.config({"mlm_weight": 0.1}, augment={**DEEP, "pairs": "one"}), tmp_path)
    halves = [touched(call).chunk(2) for call in augmented]
    for first, second in halves:
        assert torch.equal(first, ~second)
    assert not torch.equal(halves[0][0], halves[1][0])


@pytest.mark.parametrize("mlm_weight", [0.0, 0.5])
@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient_blocks_the_transformed_samples_alone(
    stop: bool, mlm_weight: float, corpus: Corpus, tmp_path: Path, augmented: list[dict[str, Tensor]]
):
    text = {"mlm_weight": mlm_weight, "mlm_share": 0.9}  # of every sentence, something is asked
    first_step(corpus.config(text, augment={**DEEP, "stop_gradient": stop}), tmp_path)
    assert len(augmented) == 1 + bool(mlm_weight)
    for call in augmented:
        got = call["h"].grad.flatten(1).abs().amax(1) > 0
        chosen = touched(call)
        assert got[~chosen].all()
        assert got[chosen].any() != stop


def test_a_stopped_gradient_leaves_everything_before_the_layer_as_it_was(corpus: Corpus, tmp_path: Path):
    first_step(corpus.config(augment={**DEEP, "fraction": 1.0}), tmp_path)
    start, end = weights(tmp_path).values()
    before = [name for name in start if name.startswith(("backbone.embeddings.", "backbone.encoder.layer.0."))]
    after = [name for name in start if name.startswith(("backbone.encoder.layer.1.output.dense.weight", "head."))]
    assert before
    assert all(torch.equal(start[name], end[name]) for name in before)
    assert not any(torch.equal(start[name], end[name]) for name in after)


def test_a_layer_may_be_the_papers_number(corpus: Corpus, tmp_path: Path):
    for number, name in enumerate(LAYERS):
        chosen = corpus.config(augment={**DEEP, "layer": str(number)})
        start = build_start(chosen, corpus.data())
        assert augmented_layers(chosen, start.network, start.example) == [name]
    for layer in ("2", LAYERS[2]):
        run(corpus.config(augment={**DEEP, "layer": layer}), tmp_path / layer)
    assert same(*(weights(tmp_path / layer)["epoch-0001.safetensors"] for layer in ("2", LAYERS[2])))
    with pytest.raises(UnknownLayerError, match="4"):
        run(corpus.config(augment={**DEEP, "layer": "4"}), tmp_path / "beyond")


def test_model_dropout_0_switches_the_models_dropout_off(corpus: Corpus, tmp_path: Path):
    for rate, alike in ((0.0, True), (0.1, False), (None, False)):
        chosen = corpus.config({"model_dropout": rate}, augment={"layer": "1", "fraction": 0.0})
        _, (seen,), _ = first_step(chosen, tmp_path / str(rate))
        one, other = seen["output"].chunk(2)
        assert torch.equal(one, other) == alike


def test_without_any_dropout_the_augmentation_makes_the_views(corpus: Corpus, tmp_path: Path):
    _, (seen,), _ = first_step(corpus.config({"model_dropout": 0.0}, augment={**DEEP, "pairs": "one"}), tmp_path)
    one, other = seen["output"].chunk(2)
    assert ((one - other).abs().amax(1) > 1e-3).all()


def test_simcse_without_any_difference_of_views_is_refused(corpus: Corpus, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"both views of a sentence are the same.*model_dropout = 0.1"):
        run(corpus.config({"model_dropout": 0.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


PADDABLE = {
    "pca per sample": {"objective": "simcse", "augment": {"layer": "1", "transform": "pca"}},
    "pca per token": {"objective": "simcse", "augment": {"layer": "1", "transform": "pca", "per_token": True}},
    "pca, stop": {"objective": "simcse", "augment": {"layer": "2", "transform": "pca", "stop_gradient": True}},
    "pairs": {"objective": "pairs", "batch_size": 16},
}


@pytest.fixture(scope="module")
def lively(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so large that sentences lie far apart: else the gradient drowns in rounding."""
    network = build_network(corpus.config(), corpus.data())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    path = tmp_path_factory.mktemp("lively") / "weights.safetensors"
    save_checkpoint(path, network, {})
    return path


@pytest.mark.parametrize("pooling", ["cls-before-head", "mean", "first-last-mean"])
@pytest.mark.parametrize("kind", PADDABLE)
def test_padding_does_not_change_a_step(
    kind: str, pooling: str, corpus: Corpus, lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {**PADDABLE[kind], "init": str(lively), "optimizer": "sgd", "learning_rate": 0.05}
    chosen = corpus.config({"model_dropout": 0.0, "pooling": pooling}, **settings)
    _, (short,), loss = first_step(chosen, tmp_path / "plain")
    whole = TextFeed.batch

    def batch(self: TextFeed, *args: Any) -> Any:
        found = whole(self, *args)
        pad = self.tokenize.__self__.tokenizer.pad_token_id  # type: ignore[attr-defined]
        fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
        more = {name: nn.functional.pad(t, (0, 5), value=fill[name]) for name, t in found.tokens.items()}
        return feeds.TokenBatch(tokens=more, columns=found.columns, draws=found.draws)

    monkeypatch.setattr(TextFeed, "batch", batch)
    _, (long,), padded = first_step(chosen, tmp_path / "padded")
    assert long["input_ids"].shape[1] == short["input_ids"].shape[1] + 5
    assert padded == pytest.approx(loss, rel=1e-5)
    start, end = weights(tmp_path / "plain").values()
    found = weights(tmp_path / "padded")["epoch-0001.safetensors"]
    moved = max(float((end[name] - start[name]).abs().max()) for name in end)
    assert moved > 1e-3, moved
    for name, value in end.items():
        torch.testing.assert_close(found[name], value, atol=1e-3 * moved, rtol=0, msg=name)


# --- the optimizer's step ---


def norm_of_gradient(network: nn.Module) -> float:
    grads = [p.grad.double().flatten() for p in network.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm())


def norms(chosen: RunConfig, folder: Path) -> list[float]:
    """Norm of the gradient that each step used."""
    found: list[float] = []
    trainer = trainer_of(chosen, folder, progress=lambda _: found.append(norm_of_gradient(trainer.network)))
    trainer.run()
    return found


def test_the_gradient_is_clipped_at_its_norm(corpus: Corpus, tmp_path: Path):
    free = norms(corpus.config({"mlm_weight": 0.1}, clip=1e6, learning_rate=1e-9), tmp_path / "free")
    clip = sorted(free)[2]  # some steps above, some below
    bound = norms(corpus.config({"mlm_weight": 0.1}, clip=clip, learning_rate=1e-9), tmp_path / "bound")
    assert bound == pytest.approx([min(norm, clip) for norm in free], rel=1e-3)
    assert max(free) > 1.01 * clip


def test_a_clip_of_0_clips_nothing(corpus: Corpus, tmp_path: Path):
    free = norms(corpus.config(clip=1e6), tmp_path / "free")
    assert norms(corpus.config(clip=0.0), tmp_path / "none") == free
    assert make_config({"objective": "simcse", "clip": None}).clip == 1.0  # SimCSE's own
    assert make_config({}).clip is None


def test_parts_of_a_batch_are_clipped_together(corpus: Corpus, tmp_path: Path):
    chosen = corpus.config(objective="pairs", batch_size=16, accumulate=2, clip=0.01)
    assert norms(chosen, tmp_path) == pytest.approx([0.01] * 3, rel=1e-3)


def rates(chosen: RunConfig, folder: Path) -> list[float]:
    found: list[float] = []
    trainer = trainer_of(chosen, folder, progress=lambda _: found.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.run()
    return found


def linear_of_transformers(steps: int, warmup: int, peak: float) -> list[float]:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    found = []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_the_learning_rate_falls_as_transformers_has_it(corpus: Corpus, tmp_path: Path):
    chosen = corpus.config(epochs=2)
    expected = linear_of_transformers(2 * STEPS, 0, 5e-3)
    assert rates(chosen, tmp_path) == pytest.approx(expected[:-1], rel=1e-9)
    logged = [line["learning_rate"] for line in lines(tmp_path, "metrics")]
    assert logged == pytest.approx([expected[STEPS - 1], expected[2 * STEPS - 1]], rel=1e-9)
    assert learning_rate(chosen, 2, STEPS) == expected[-1] == 0


def test_after_a_warmup_the_rate_is_transformers_too():
    chosen = make_config({"objective": "simcse", "epochs": 10, "warmup_epochs": 1.0})
    found = [learning_rate(chosen, k / STEPS, STEPS) for k in range(10 * STEPS)]
    expected = linear_of_transformers(10 * STEPS, STEPS, chosen.learning_rate or 0)
    assert found[STEPS:] == pytest.approx(expected[STEPS:-1], rel=1e-9)
    assert found[:STEPS] == pytest.approx([3e-5 * (k + 1) / (STEPS + 1) for k in range(STEPS)], rel=1e-9)


def test_the_rate_may_be_constant_or_a_cosine(corpus: Corpus, tmp_path: Path):
    assert rates(corpus.config(schedule="constant"), tmp_path / "constant") == [5e-3] * STEPS
    expected = [5e-3 * (1 + math.cos(math.pi * k / STEPS)) / 2 for k in range(STEPS)]
    assert rates(corpus.config(schedule="cosine"), tmp_path / "cosine") == pytest.approx(expected)


def test_weight_decay_is_decoupled_as_in_adamw(corpus: Corpus, tmp_path: Path):
    """The first step of AdamW moves each weight by rate · (sign of its gradient + decay · weight)."""
    chosen = corpus.config(weight_decay=0.5, clip=1e6)
    trainer, _, _ = first_step(chosen, tmp_path)
    start, end = weights(tmp_path).values()
    name = "backbone.encoder.layer.1.output.dense.weight"
    gradient = trainer.network.get_parameter(name).grad
    clear = gradient.abs() > 1e-4  # beyond Adam's epsilon
    expected = start[name] - 5e-3 * (gradient.sign() + 0.5 * start[name])
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(end[name][clear], expected[clear], atol=2e-6, rtol=0)


def test_defaults_are_those_of_simcse(corpus: Corpus):
    chosen = make_config({"objective": "simcse"})
    found = (chosen.optimizer, chosen.learning_rate, chosen.batch_size, chosen.temperature, chosen.epochs)
    assert found == ("adamw", 3e-5, 64, 0.05, 1)
    assert (chosen.schedule, chosen.clip, chosen.weight_decay, chosen.warmup_epochs) == ("linear", 1.0, 0.0, 0.0)
    network: Any = build_network(chosen.model_copy(update={"model": corpus.model()}), corpus.data())
    assert (network.pooling, network.max_length, network.head is None) == ("cls-before-head", 32, False)


# --- where a run begins ---


@pytest.mark.parametrize("mlm_weight", [0.0, 0.1])
def test_simcse_takes_the_backbone_of_an_mlm_run_and_draws_its_head(
    mlm_weight: float, corpus: Corpus, pretrained: Path, tmp_path: Path
):
    chosen = corpus.config({"mlm_weight": mlm_weight}, init=str(pretrained))
    run(chosen, tmp_path)
    started, metadata = load_state(tmp_path / "checkpoints" / "epoch-0000.safetensors")
    learned = load_state(pretrained)[0]
    fresh = build_network(chosen.model_copy(update={"init": None}), corpus.data()).state_dict()
    origin = {name: learned if name.startswith("backbone.") or mlm_weight else fresh for name in started}
    assert {name.split(".")[0] for name in started} == {"backbone", "head", *["mlm_head"] * bool(mlm_weight)}
    for name, value in started.items():
        expected = fresh[name] if name.startswith("head.") else origin[name][name]
        assert torch.equal(value, expected), name
    assert metadata["fresh_head"] is True
    assert not torch.equal(fresh["head.0.weight"], build_network(corpus.config(seed=1), corpus.data()).head[0].weight)


def test_a_run_goes_on_from_one_with_the_same_heads(corpus: Corpus, tmp_path: Path):
    first = tmp_path / "one" / run(corpus.config(), tmp_path / "one").checkpoints[-1]
    run(corpus.config(init=str(first), seed=5), tmp_path / "two")
    assert same(load_state(first)[0], load_state(tmp_path / "two" / "checkpoints" / "epoch-0000.safetensors")[0])


def test_an_init_of_another_width_is_refused(corpus: Corpus, pretrained: Path, tmp_path: Path):
    wider = corpus.model().replace("width=16", "width=32")
    with pytest.raises(CheckpointError, match=r"of another architecture: .*32.*16") as caught:
        run(corpus.config(model=wider, init=str(pretrained)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_init_with_other_blocks_is_refused(corpus: Corpus, pretrained: Path, tmp_path: Path):
    deeper = corpus.model().replace("layers=2", "layers=3")
    with pytest.raises(CheckpointError, match=r"layer\.2"):
        run(corpus.config(model=deeper, init=str(pretrained)), tmp_path / "run")


# --- the same run, whatever happens to it ---


def test_the_same_settings_give_the_same_run(corpus: Corpus, tmp_path: Path):
    chosen = corpus.config(corpus.scored(mlm_weight=0.1, dev_every=2), **RICH)
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)  # whatever the global generator is at
        run(chosen, tmp_path / name)
    assert_alike(tmp_path / "one", tmp_path / "two")
    run(chosen.model_copy(update={"seed": 1}), tmp_path / "three")
    assert not same(*(weights(tmp_path / name)["epoch-0002.safetensors"] for name in ("one", "three")))


RESUMED: dict[str, dict[str, Any]] = {
    "simcse, mlm, Deep Augmentation": {**RICH, "text": {"mlm_weight": 0.1, "dev_every": 2}},
    "pairs": {"objective": "pairs", "batch_size": 16, "epochs": 2, "text": {"dev_every": 3}},
    "mlm": {"objective": "mlm", "epochs": 2, "text": {"dev_every": 1}, "accumulate": 2},
    "dev each epoch": {"epochs": 2, "text": {}},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    kind: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = dict(RESUMED[kind])
    chosen = corpus.config(corpus.scored(**settings.pop("text")), **settings)
    run(chosen, tmp_path / "whole")
    for name, save_every, stops in (("each step", -1.0, (1, 4)), ("each epoch", 60.0, (STEPS - 2,))):
        monkeypatch.setattr(loop, "SAVE_EVERY_S", save_every)
        for step in stops:
            with suppress(KeyboardInterrupt):
                run(chosen, tmp_path / name, progress=interrupt_at(step))
            assert not (tmp_path / name / "result.json").exists()
        run(chosen, tmp_path / name)
        assert_alike(tmp_path / name, tmp_path / "whole")


def test_lines_of_a_look_that_was_not_saved_are_not_there_twice(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A process that ends between the line of a look and its state."""
    chosen = corpus.config(corpus.scored(dev_every=1))
    run(chosen, tmp_path / "whole")
    whole, written = loop.write_atomically, []

    def write(path: Path, content: bytes) -> None:
        if path.name == "resume.pt":
            written.append(path)
            if len(written) == 3:
                raise KeyboardInterrupt
        whole(path, content)

    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(loop, "write_atomically", write)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, tmp_path / "run")
    assert len((tmp_path / "run" / "dev.jsonl").read_text().splitlines()) == 3
    run(chosen, tmp_path / "run")
    assert_alike(tmp_path / "run", tmp_path / "whole")


KILLED = """
import os, signal, sys
from test_text_training import Corpus, Path, RICH, loop, run
loop.SAVE_EVERY_S = -1.0
count = 0
def watch(progress):
    if progress.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
corpus = Corpus(Path(sys.argv[1]))
run(corpus.config(corpus.scored(mlm_weight=0.1, dev_every=2), **RICH), Path(sys.argv[2]), progress=watch)
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(corpus: Corpus, tmp_path: Path):
    here = Path(__file__).parent
    where = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", KILLED, str(corpus.folder), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": where}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "run" / "result.json").exists()
    assert (tmp_path / "run" / "resume.pt").exists()
    chosen = corpus.config(corpus.scored(mlm_weight=0.1, dev_every=2), **RICH)
    for name in ("run", "whole"):
        run(chosen, tmp_path / name)
    assert_alike(tmp_path / "run", tmp_path / "whole")


# --- dev pairs ---


@pytest.fixture(scope="module")
def looked(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of ten steps that looks at the dev pairs every third: its folder and its result."""
    folder = tmp_path_factory.mktemp("looked")
    return folder, run(corpus.config(corpus.scored(dev_every=3), epochs=2, keep_every=1), folder)


def test_it_looks_every_so_many_steps_and_after_the_last(looked: tuple[Path, Any]):
    folder, result = looked
    found = lines(folder, "dev")
    assert [(line["look"], line["step"]) for line in found] == [(1, 3), (2, 6), (3, 9), (4, 10)]
    assert result.dev == found[-1]["dev"] == lines(folder, "metrics")[-1]["dev"]


def test_the_best_checkpoint_scores_the_best_of_all_looks(looked: tuple[Path, Any], corpus: Corpus):
    folder, result = looked
    every = {line["step"]: line["dev"] for line in lines(folder, "dev")}
    assert len(set(every.values())) > 2
    best, metadata = load_network(folder / "checkpoints" / "best.safetensors")
    step = max(every, key=lambda k: every[k])
    assert result.best == {"step": step, "dev": every[step]} == {"step": metadata["step"], "dev": metadata["dev"]}
    (task,) = corpus.data("sts").tasks
    assert spearman(best, task) == pytest.approx(every[step], abs=1e-9)


def test_the_dev_score_is_that_of_the_kept_checkpoint(looked: tuple[Path, Any], corpus: Corpus):
    folder, _ = looked
    (task,) = corpus.data("sts").tasks
    for line in lines(folder, "metrics"):
        kept, _ = load_network(folder / "checkpoints" / f"epoch-{line['epoch']:04d}.safetensors")
        assert spearman(kept, task) == pytest.approx(line["dev"], abs=1e-9)


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (5, [5]), (4, [4, 5]), (7, [5]), (2, [2, 4, 5])])
def test_a_distance_that_does_not_divide_the_steps_ends_with_a_look(
    every: int, steps: list[int], corpus: Corpus, tmp_path: Path
):
    run(corpus.config(corpus.scored(dev_every=every)), tmp_path)
    assert [line["step"] for line in lines(tmp_path, "dev")] == steps


def test_without_a_distance_it_looks_at_each_epochs_end(corpus: Corpus, tmp_path: Path):
    result = run(corpus.config(corpus.scored(), epochs=2), tmp_path)
    scores = [line["dev"] for line in lines(tmp_path, "metrics")]
    assert None not in scores
    assert result.best["dev"] == max(scores)
    assert not (tmp_path / "dev.jsonl").exists()


def test_looking_changes_nothing(corpus: Corpus, tmp_path: Path):
    chosen = {"none": None, "epochs": corpus.scored(), "steps": corpus.scored(dev_every=1)}
    for name, text in chosen.items():
        run(corpus.config({"mlm_weight": 0.1, **(text or {})}, **RICH), tmp_path / name)
    ours = [weights(tmp_path / name) for name in chosen]
    for found in ours[1:]:
        assert all(same(found[name], ours[0][name]) for name in ours[0])


def test_without_dev_pairs_nothing_is_scored_and_nothing_is_best(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("scored")

    monkeypatch.setattr(feeds, "sts_scores", never)
    result = run(corpus.config(), tmp_path / "without")
    assert (result.dev, result.best) == (None, None)
    assert [line["dev"] for line in lines(tmp_path / "without", "metrics")] == [None]
    assert sorted(weights(tmp_path / "without")) == ["epoch-0000.safetensors", "epoch-0001.safetensors"]
    with pytest.raises(AssertionError, match="scored"):
        run(corpus.config(corpus.scored()), tmp_path / "with")


# --- which run it is ---


def identity(chosen: RunConfig) -> str:
    return loop.resolve(chosen, loop.load_data(chosen.data)).identity()


def test_the_identity_is_that_of_the_dev_pairs_content_not_of_their_place(corpus: Corpus, tmp_path: Path):
    moved = Path(shutil.copy(corpus.dev, tmp_path / "dev.csv"))
    rows = [(5.0 - k, "a bird sings", sentence((k, k, k, 1))) for k in range(5)]
    other = write_csv(tmp_path / "others" / "dev.csv", ["score", "sentence1", "sentence2"], rows)
    found = [identity(corpus.config({"dev": f"sts:{path}"})) for path in (corpus.dev, moved, other)]
    assert found[0] == found[1] != found[2]
    assert identity(corpus.config()) not in found


def test_the_identity_is_that_of_the_sentences_content(corpus: Corpus, tmp_path: Path):
    moved = Path(shutil.copy(corpus.text, tmp_path / "moved.txt"))
    other = tmp_path / "other.txt"
    other.write_text(corpus.text.read_text().replace("bird", "cat"))
    found = [identity(corpus.config(data=f"text:{path}")) for path in (corpus.text, moved, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"pooling": "mean"}), ({}, {"max_length": 8}), ({}, {"model_dropout": 0.2}), ({}, {"mlm_weight": 0.1}),
        ({"mlm_weight": 0.1}, {"mlm_weight": 0.1, "mlm_share": 0.2}),
    ],
)  # fmt: skip
def test_every_setting_of_text_makes_another_run(one: dict[str, Any], other: dict[str, Any], corpus: Corpus):
    assert corpus.config(one).identity() != corpus.config(other).identity()


def test_runs_on_images_are_the_runs_they_were():
    assert make_config({}).identity() == "9bd7fa97d63b678f"


def copied(corpus: Corpus, folder: Path, *, words: str = "") -> str:
    """The model with its tokenizer at another place, perhaps with another content."""
    from layerlens.encoders import train_tokenizer

    if words:
        train_tokenizer([words] * 2, folder)
    else:
        shutil.copytree(corpus.tokenizer, folder)
    return corpus.model().replace(str(corpus.tokenizer), str(folder))


def test_another_tokenizer_at_the_same_place_is_another_run(corpus: Corpus, tmp_path: Path):
    model = copied(corpus, tmp_path / "tokenizer")
    before = identity(corpus.config(model=model))
    shutil.rmtree(tmp_path / "tokenizer")
    copied(corpus, tmp_path / "tokenizer", words="quite other words")
    assert identity(corpus.config(model=model)) != before


def test_a_tokenizer_that_moved_is_the_same_run(corpus: Corpus, tmp_path: Path):
    assert identity(corpus.config(model=copied(corpus, tmp_path / "moved"))) == identity(corpus.config())


# --- a checkpoint is whole ---


def test_a_checkpoint_needs_neither_tokenizer_nor_data(corpus: Corpus, tmp_path: Path):
    own = make_corpus(tmp_path)
    sentences = own.text.read_text().splitlines()[:20]
    trainer = trainer_of(own.config({"mlm_weight": 0.1}, augment=DEEP), tmp_path / "run")
    trainer.run()
    expected = trainer.network.embed(sentences)
    shutil.rmtree(own.tokenizer)
    for path in (own.text, own.dev, own.pairs):
        path.unlink()
    found, metadata = load_network(tmp_path / "run" / "checkpoints" / "epoch-0001.safetensors")
    assert metadata["epoch"] == 1
    assert torch.equal(found.embed(sentences), expected)
    assert found.layer_names == LAYERS
    assert found.mlm_head is not None


@pytest.mark.parametrize("pooling", ["cls", "cls-before-head", "mean", "first-last-mean"])
def test_each_pooling_trains_and_comes_back(pooling: str, corpus: Corpus, tmp_path: Path):
    trainer, (seen,), _ = first_step(corpus.config({"pooling": pooling}), tmp_path)
    assert (trainer.network.head is not None) == pooling.startswith("cls")
    assert seen["output"].shape == (64, 16)
    found, _ = load_network(tmp_path / "checkpoints" / "epoch-0001.safetensors")
    assert found.pooling == pooling
    assert torch.equal(found.embed(["a bird sings"]), trainer.network.embed(["a bird sings"]))


# --- refusals ---

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "views": ({"views": {"flip": 0.5}}, r"\[views\] with objective='simcse'; it is for images"),
    "adalase": ({"adalase": {}}, r"\[adalase\] with objective='simcse'; it is for images"),
    "input_augment": ({"input_augment": "cutmix"}, "input_augment='cutmix' with objective='simcse'"),
    "channels_last": ({"channels_last": True}, "channels_last=true with objective='simcse'"),
    "mlm_weight": ({"objective": "pairs", "text": {"mlm_weight": 0.1}}, "mlm_weight=0.1 with objective='pairs'"),
    "dev_every": ({"text": {"dev_every": 5}}, r"dev_every=5 without text.dev; say on which sts:PATH"),
    "temperature": ({"objective": "mlm", "temperature": 0.5}, "temperature=0.5 with mlm, which has none"),
    "one": ({"objective": "mlm", "augment": {"layer": "1", "pairs": "one"}}, "mlm has one"),
    "labels": ({"labels": 0.5}, "labels=0.5 with objective='simcse', which sees no labels"),
    "text": ({"objective": "simclr", "text": {}}, r"\[text\] with objective='simclr'; leave it out or use simcse"),
    "pooling": ({"text": {"pooling": "max"}}, "pooling"),
    "dropout": ({"text": {"model_dropout": 1.0}}, "model_dropout"),
    "share": ({"text": {"mlm_share": 0.0}}, "mlm_share"),
    "typo": ({"text": {"dev_evry": 3}}, "dev_every"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_settings_that_do_not_go_together_are_one_clear_line(kind: str):
    settings, message = MISTAKES[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        make_config({"objective": "simcse", **settings})
    assert "\n" not in str(caught.value)


def test_data_of_the_wrong_kind_are_refused(corpus: Corpus, tmp_path: Path):
    for settings, message in (
        ({"data": "digits"}, "objective='simcse' trains on sentences; digits has images"),
        ({"objective": "pairs", "data": corpus.spec()}, "needs pairs of sentences; .* has single ones. Use pairs:PATH"),
        ({"text": {"dev": "digits"}}, "text.dev='digits' holds no scored pairs of sentences; allowed: sts:PATH"),
    ):
        with pytest.raises(LayerlensError, match=message):
            run(corpus.config(**settings), tmp_path / "run")
    chosen = make_config({"objective": "simclr", "model": "mlp", "data": corpus.spec()})
    with pytest.raises(ConfigError, match=r"objective='simclr' trains on images; .* has sentences"):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dev_without_scores_is_refused(corpus: Corpus, tmp_path: Path):
    with pytest.raises(LayerlensError, match="sts:PATH"):
        run(corpus.config({"dev": corpus.spec()}), tmp_path)


def test_a_batch_larger_than_the_corpus_is_refused_in_words_of_sentences(corpus: Corpus, tmp_path: Path):
    with pytest.raises(ConfigError, match="batch_size=256 but only 180 training") as caught:
        run(corpus.config(batch_size=256), tmp_path / "run")
    assert "images" not in str(caught.value)


@pytest.mark.parametrize("name", [row["name"] for row in list_recipes() if "bert" in row["name"]])
def test_each_recipe_for_sentences_takes_its_first_step_here(name: str, corpus: Corpus, tmp_path: Path):
    from layerlens.training.recipes import read_recipe

    settings = read_recipe(name)
    layer = {"layer": "2"} if "augment" in settings else {}
    text = {**settings.get("text", {}), "dev": corpus.spec("sts"), "dev_every": None}
    small = {"model": corpus.model(), "data": corpus.spec(), "batch_size": 16, "train_samples": 16, "epochs": 1}
    settings.pop("epoch_samples", None)
    made = {**settings, **small, "text": {k: v for k, v in text.items() if v is not None}}
    if layer:
        made["augment"] = {**settings["augment"], **layer}
    assert recipe_text(name)
    assert run(make_config(made), tmp_path).best is not None


# --- two processes ---


def both_ranks(report: Callable[[Any], None], where: Path, folder: Path) -> None:
    """One rank's share of two trainings."""
    corpus = Corpus(where)
    for kind, chosen in divided(corpus).items():
        trainer_of(chosen.model_copy(update={"devices": 2}), folder / kind).run()
    rich = corpus.config({"mlm_weight": 0.1}, **{**RICH, "epochs": 1}, devices=2)  # two passes before a gradient
    trainer = trainer_of(rich, folder / "rich")
    trainer.run()
    torch.save(trainer.network.state_dict(), folder / f"rich-{trainer.rank}.pt")
    report("done")


def divided(corpus: Corpus) -> dict[str, RunConfig]:
    """Runs without a draw that depends on where a sentence is, and steps in proportion to the gradient."""
    plain = {"model_dropout": 0.0, "pooling": "mean"}
    common: dict[str, Any] = {"batch_size": 16, "optimizer": "sgd", "learning_rate": 0.5, "clip": 1e6}
    transform = {"layer": "1", "fraction": 0.0}  # none, but it lets simcse begin without dropout
    return {
        "pairs": corpus.config(corpus.scored(**plain, dev_every=2), objective="pairs", **common),
        "simcse": corpus.config(plain, train_samples=64, augment=transform, temperature=0.5, **common),
    }


@pytest.mark.slow
def test_two_ranks_train_as_one(corpus: Corpus, tmp_path: Path):
    reports: list[Any] = []
    launch(both_ranks, 2, (corpus.folder, tmp_path / "two"), reports.append)
    assert reports == ["done", "done"]
    for kind, chosen in divided(corpus).items():
        run(chosen, tmp_path / "one" / kind)
        found, expected = weights(tmp_path / "two" / kind), weights(tmp_path / "one" / kind)
        assert found.keys() == expected.keys()
        start, end = (expected[f"epoch-000{k}.safetensors"] for k in (0, 1))
        assert max(float((end[name] - start[name]).abs().max()) for name in end) > 1e-3
        for name, value in end.items():
            torch.testing.assert_close(found["epoch-0001.safetensors"][name], value, atol=1e-5, rtol=0)
        losses = [lines(tmp_path / ranks / kind, "metrics")[0]["loss"] for ranks in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert same(*(torch.load(tmp_path / "two" / f"rich-{rank}.pt") for rank in (0, 1)))
    scores = [[line["step"] for line in lines(tmp_path / ranks / "pairs", "dev")] for ranks in ("one", "two")]
    assert scores[0] == scores[1] == [2, 3]
