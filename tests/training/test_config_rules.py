"""Rules over several fields, ranges of every table, identities, TOML, and what `init` hands on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError
from layerlens.training.checkpoint import load_state
from layerlens.training.config import TABLES, RunConfig, make_config, read_config
from layerlens.training.loop import train
from layerlens.training.network import build_network

MOCO = {"objective": "moco"}
SUPERVISED = {"objective": "supervised"}


def refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        make_config(settings)
    assert "\n" not in str(caught.value)


# --- rules over several fields ---

RULES: list[tuple[dict[str, Any], str]] = [
    (
        {"batch_size": 100, "accumulate": 3},
        r"^batch_size=100 does not divide into accumulate=3 × devices=1 parts of 2 images or more; choose a multiple$",
    ),
    ({"batch_size": 100, "devices": 8}, r"batch_size=100 .* accumulate=1 × devices=8"),
    (
        {"batch_size": 8, "accumulate": 4, "devices": 2},
        r"batch_size=8 does not divide into .* parts of 2 images or more",
    ),
    ({"batch_size": 4, "accumulate": 8}, r"batch_size=4 does not divide"),
    ({**MOCO, "batch_size": 4, "accumulate": 8}, r"batch_size=4 does not divide"),
    ({"moco": {}}, r"^\[moco\] with objective='simclr'; leave it out or use objective='moco'$"),
    ({**SUPERVISED, "moco": {"queue": 256}}, r"\[moco\] with objective='supervised'"),
    (
        {**MOCO, "moco": {"queue": 1000}},
        r"^moco\.queue=1000 is not a multiple of the 256 keys of a step; try 1024$",
    ),
    ({**MOCO, "moco": {"queue": 100}}, r"moco\.queue=100 .* 256 keys .*; try 256"),
    (
        {**MOCO, "batch_size": 96, "moco": {"queue": 65536}},
        r"moco\.queue=65536 is not a multiple of the 96 keys of a step; try 65568",
    ),
    (
        {**MOCO, "accumulate": 2, "devices": 2, "moco": {"queue": 192}},
        r"moco\.queue=192 is not a multiple of the 128 keys of a step; try 256",  # 1.5 steps, rounded to even
    ),
    (
        {**MOCO, "moco": {"queue": 256, "bn_splits": 3}},
        r"^moco\.bn_splits=3 does not divide the 256 images of a pass$",
    ),
    (
        {**MOCO, "accumulate": 4, "devices": 2, "moco": {"queue": 256, "bn_splits": 64}},
        r"moco\.bn_splits=64 does not divide the 32 images of a pass",
    ),
    (
        {"input_augment": "mixup"},
        r"^input_augment='mixup' mixes images; only moco and supervised have a mixed loss$",
    ),
    ({"objective": "supcon", "input_augment": "cutmix"}, r"input_augment='cutmix' mixes images"),
    ({"nesterov": True, "momentum": 0.0}, r"^nesterov=true needs momentum above 0$"),
    ({"nesterov": True, "momentum": 0.0, "optimizer": "lars"}, r"nesterov=true needs momentum above 0"),
    (
        {"freeze": {"part": "before"}},
        r"^\[freeze\] needs layer = …, or an \[augment\] whose layer it takes$",
    ),
    (
        {**MOCO, "augment": {"layer": "layer1", "pairs": "one"}},
        r"^augment\.pairs='one' needs both views in one network; moco has none$",
    ),
    (
        {**SUPERVISED, "augment": {"layer": "x", "pairs": "one"}},
        r"needs both views in one network; supervised has none",
    ),
    (
        {"augment": {"layer": "layer1", "pairs": "one", "fraction": 0.25}},
        r"^augment\.pairs='one' with fraction=0\.25; half of the views are transformed$",
    ),
    (
        {**MOCO, "adalase": {}},
        r"^\[adalase\] goes with simclr, supcon or supervised: a validation batch must not enter MoCo's queue$",
    ),
    (
        {"adalase": {"kinds": ["cutout", "mixup"]}},
        r"^adalase\.kinds=\['cutout', 'mixup'\] mix samples; only supervised has a mixed loss at a layer$",
    ),
    ({"objective": "supcon", "adalase": {"kinds": ["cutmix"]}}, r"adalase\.kinds=\['cutmix'\] mix samples"),
    (
        {**SUPERVISED, "adalase": {"kinds": ["mixup"]}, "input_augment": "cutmix"},
        r"^latent mixing goes with neither input mixing nor accumulate above 1$",
    ),
    ({**SUPERVISED, "adalase": {"kinds": ["mixup"]}, "accumulate": 2}, r"latent mixing goes with neither"),
    (
        {**SUPERVISED, "adalase": {}, "precision": "16-mixed"},
        r"^\[adalase\] compares gradients, which 16-mixed scales; use precision='bf16-mixed' or '32-true'$",
    ),
]


@pytest.mark.parametrize(("settings", "match"), RULES)
def test_what_does_not_go_together_is_refused_in_one_line(settings: dict[str, Any], match: str):
    refused(settings, match)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 8, "accumulate": 2, "devices": 2},
        {**MOCO, "batch_size": 64},
        {**MOCO, "moco": {"queue": 512, "bn_splits": 128}},
        {**MOCO, "accumulate": 2, "devices": 2, "moco": {"queue": 128}},
        {**MOCO, "input_augment": "mixup"},
        {**SUPERVISED, "input_augment": "cutmix"},
        {"input_augment": "erasing"},
        {"nesterov": True},
        {"freeze": {"part": "after"}, "augment": {"layer": "layer1"}},
        {"freeze": {"part": "after", "layer": "layer1"}},
        {"objective": "supcon", "augment": {"layer": "layer1", "pairs": "one"}, "accumulate": 2},
        {**SUPERVISED, "adalase": {"kinds": ["mixup", "cutmix", "cutout"]}},
        {"adalase": {"kinds": ["cutout", "noise"]}, "accumulate": 2, "precision": "bf16-mixed"},
        {**SUPERVISED, "adalase": {"kinds": ["dropout"]}, "input_augment": "mixup"},
    ],
)
def test_what_goes_together_is_allowed(settings: dict[str, Any]):
    config = make_config(settings)
    assert make_config(config.model_dump(mode="json")) == config


def test_every_suggestion_for_a_queue_is_allowed():
    for batch_size, queue in ((96, 65536), (256, 1), (256, 5000), (10, 14)):
        with pytest.raises(ConfigError, match="try ") as caught:
            make_config({**MOCO, "batch_size": batch_size, "moco": {"queue": queue}})
        better = int(str(caught.value).rpartition("try ")[2])
        assert make_config({**MOCO, "batch_size": batch_size, "moco": {"queue": better}}).moco.queue == better


@pytest.mark.parametrize(
    ("objective", "temperature", "labels"),
    [("simclr", 0.5, 1.0), ("supcon", 0.5, 1.0), ("supervised", 1.0, 1.0), ("moco", 0.2, 0.0)],
)
def test_what_an_objective_fills_in(objective: str, temperature: float, labels: float):
    config = make_config({"objective": objective})
    assert (config.temperature, config.labels) == (temperature, labels)
    assert (config.moco is not None) == (objective == "moco")
    share = 0.25 if objective in ("supcon", "moco") else 1.0
    warm = 1.0 if objective == "supervised" else 0.07
    own = make_config({"objective": objective, "temperature": warm, "labels": share})
    assert (own.temperature, own.labels) == (warm, share)


# --- ranges ---

AUGMENT, FREEZE = {"layer": "layer1"}, {"part": "before", "layer": "layer1"}
RANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 2**63}, r"seed=9223372036854775808: input should be less than"),
    ({"accumulate": 0}, r"accumulate=0: input should be greater than or equal to 1"),
    ({"devices": 0}, r"devices=0: input should be greater than or equal to 1"),
    ({"optimizer": "adam"}, r"optimizer='adam' is unknown; .*\(allowed: sgd, lars, adamw\)"),
    ({"momentum": -0.1}, r"momentum=-0\.1"),
    ({"warmup_from": 9.0}, r"^warmup_from=9\.0 above learning_rate=0\.12; a warm-up rises"),
    ({"temperature": 0.1, "objective": "supervised"}, r"^temperature=0\.1 with supervised training"),
    ({"labels": 0.5}, r"^labels=0\.5 with simclr, which sees no labels"),
    ({"warmup_from": -1.0}, r"warmup_from=-1\.0: input should be greater than or equal to 0"),
    ({"labels": 1.5}, r"labels=1\.5: input should be less than or equal to 1"),
    ({"labels": -0.5}, r"labels=-0\.5: input should be greater than or equal to 0"),
    ({"train_samples": 3}, r"train_samples=3: input should be greater than or equal to 4"),
    ({"holdout": -0.1}, r"holdout=-0\.1"),
    ({"input_augment": "cutmx"}, r"input_augment='cutmx' is unknown; closest: cutmix"),
    ({"augment": {**AUGMENT, "rate": -0.1}}, r"augment\.rate=-0\.1"),
    ({"augment": {**AUGMENT, "fraction": 1.1}}, r"augment\.fraction=1\.1"),
    ({"augment": {**AUGMENT, "components": -7}}, r"augment\.components=-7"),
    ({"augment": {**AUGMENT, "components": 0}}, r"augment\.components=0: .*allowed: 1 to 6"),
    ({"augment": {**AUGMENT, "pairs": "two"}}, r"augment\.pairs='two' is unknown; .*\(allowed: independent, one\)"),
    ({"augment": {**AUGMENT, "transform": "noize"}}, r"augment\.transform='noize' is unknown; closest: noise"),
    ({"freeze": {}}, r"freeze\.part.*field required"),
    ({"freeze": {**FREEZE, "part": "befor"}}, r"freeze\.part='befor' is unknown; closest: before"),
    ({"freeze": {**FREEZE, "layr": 1}}, r"unknown setting 'freeze\.layr'; closest: layer"),
    ({"adalase": {"eta": 0.0}}, r"adalase\.eta=0\.0: input should be greater than 0"),
    ({"adalase": {"floor": 0.0}}, r"adalase\.floor=0\.0: input should be greater than 0"),
    ({"adalase": {"floor": 1.1}}, r"adalase\.floor=1\.1: input should be less than or equal to 1"),
    ({"adalase": {"interval": 0}}, r"adalase\.interval=0: input should be greater than or equal to 1"),
    ({"adalase": {"rotation": -1.0}}, r"adalase\.rotation=-1\.0"),
    ({"adalase": {"kinds": ["cutuot"]}}, r"adalase\.kinds\.0='cutuot' is unknown; closest: cutout"),
    ({"adalase": {"etta": 1}}, r"unknown setting 'adalase\.etta'; closest: eta"),
    ({"dropout": {"kind": "backwards"}}, r"dropout\.kind='backwards' is unknown; closest: backward"),
    ({"dropout": {"rate": 1.0}}, r"dropout\.rate=1\.0: input should be less than 1"),
    ({"dropout": {"rate": -0.1}}, r"dropout\.rate=-0\.1"),
    ({"dropout": {"kind": "augmented", "backward_rate": 1.0}}, r"dropout\.backward_rate=1\.0"),
    ({"dropout": {"kind": "augmented", "backward_rate": -0.1}}, r"dropout\.backward_rate=-0\.1"),
    ({**MOCO, "moco": {"queue": 0}}, r"moco\.queue=0: input should be greater than or equal to 1"),
    ({**MOCO, "moco": {"key_momentum": 1.1}}, r"moco\.key_momentum=1\.1"),
    ({**MOCO, "moco": {"key_momentum": -0.1}}, r"moco\.key_momentum=-0\.1"),
    ({**MOCO, "moco": {"bn_splits": 0}}, r"moco\.bn_splits=0"),
    ({"views": {"scale": 1.1}}, r"views\.scale=1\.1"),
    ({"views": {"blur": 1.1}}, r"views\.blur=1\.1"),
    ({"views": {"blur_sigma": [0.0, 1.0]}}, r"views\.blur_sigma\.0=0\.0: input should be greater than 0"),
    ({"views": {"rotation": 181.0}}, r"views\.rotation=181\.0"),
    ({"views": {"rotation": -1.0}}, r"views\.rotation=-1\.0"),
    ({"views": {"shift": -1}}, r"views\.shift=-1"),
    ({"views": {"shift": 1.5}}, r"views\.shift=1\.5: input should be a valid integer"),
    ({"views": {"jitter": [0.1, 0.1, 0.1, 0.6]}}, r"views\.jitter\.3=0\.6: input should be less than or equal to 0\.5"),
]


@pytest.mark.parametrize(("settings", "match"), RANGES)
def test_a_value_outside_its_range_is_refused(settings: dict[str, Any], match: str):
    refused(settings, match)


@pytest.mark.parametrize(
    ("ratios", "match"),
    [
        ("unifrom", r"^adalase\.ratios='unifrom': closest: uniform"),
        ([0.5, -0.5], r"^adalase\.ratios=\[0\.5, -0\.5\]: allowed: .* a list of numbers from 0"),
        ({}, r"^adalase\.ratios="),
    ],
)
def test_ratios_that_can_not_be_are_named_plainly(ratios: Any, match: str):
    refused({"adalase": {"ratios": ratios}}, match)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("table", "field"),
    [("adalase", "eta"), ("adalase", "rotation"), ("dropout", "rate"), ("views", "rotation"), ("views", "ratio")],
)
def test_a_number_that_is_not_finite_is_refused(table: str, field: str, value: float):
    refused({table: {field: value}}, rf"{table}\.{field}")


def tiny(labels: bool = True) -> Dataset:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (72, 1, 8, 8), dtype=np.uint8), np.arange(72) % 4
    return dataset_from_arrays("tiny", x[:64], y[:64] if labels else None, x[64:], y[64:] if labels else None)


def run_config(**settings: Any) -> RunConfig:
    usual = {"model": "mlp,width=8,depth=2", "data": "tiny", "epochs": 1, "batch_size": 16, "projection": 8}
    return make_config({**usual, **settings})


@pytest.mark.parametrize(
    ("settings", "labels", "match"),
    [
        ({"views": {"blur": 0.5, "blur_sigma": [2.0, 1.0]}}, True, r"blur_sigma=\(2\.0, 1\.0\); allowed"),
        ({"dropout": {"backward_rate": 0.1}}, True, r"backward_rate=0\.1 with kind 'standard'"),
        ({"adalase": {"kinds": []}}, True, r"kinds=\[\]; allowed: at least one of each"),
        ({"adalase": {"kinds": ["noise", "noise"]}}, True, r"each once"),
        ({"adalase": {"kinds": ["noise"], "ratios": [1.0, 2.0]}}, True, r"ratios=\[1\.0, 2\.0\] for 3 arms"),
        ({"train_samples": 60}, True, r"train_samples=60 but only 58 training images beside the 6 held out"),
        ({"train_samples": 12}, True, r"batch_size=16 but only 12 training images; use a smaller batch"),
        ({"objective": "supcon"}, False, r"supcon training needs labels; tiny has none"),
        ({"objective": "supervised"}, False, r"supervised training needs labels; tiny has none"),
        (
            {"objective": "moco", "labels": 0.5, "moco": {"queue": 32}},
            False,
            r"moco training needs labels; tiny has none.*labels=0",
        ),
        (
            {"objective": "moco", "labels": 0.9, "train_samples": 15, "moco": {"queue": 32}},  # 14 and 1 for 14 and 2
            True,
            r"batch_size=16 but only 1 labelled or unlabelled training images",
        ),
    ],
)
def test_what_only_the_data_or_an_operator_can_refuse_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], labels: bool, match: str
):
    with pytest.raises(ConfigError, match=match):
        train(run_config(**settings), tmp_path / "run", dataset=tiny(labels), device="cpu")
    assert not (tmp_path / "run").exists()


def test_moco_without_labels_needs_none(tmp_path: Path):
    result = train(
        run_config(objective="moco", moco={"queue": 32}), tmp_path / "run", dataset=tiny(labels=False), device="cpu"
    )
    assert np.isfinite(result.loss)


# --- tables: identity and TOML ---

FULL: dict[str, dict[str, Any]] = {
    "augment": {
        "layer": "layer1,layer2", "transform": "noise", "rate": 0.25, "fraction": 0.75, "stop_gradient": True,
        "components": -2, "per_token": True, "pairs": "independent",
    },
    "freeze": {"part": "after", "layer": "layer3"},
    "adalase": {
        "layers": "layer1", "kinds": ["noise", "dropout"], "eta": 0.5, "floor": 0.2, "interval": 3,
        "ratios": [0.25, 0.75], "rotation": 5.0,
    },
    "dropout": {"kind": "augmented", "rate": 0.3, "backward_rate": 0.01, "layers": "linear,layer1.0.conv1"},
    "moco": {"queue": 1024, "key_momentum": 0.99, "bn_splits": 4},
    "views": {
        "scale": 0.5, "ratio": 1.5, "flip": 0.0, "jitter": [0.1, 0.2, 0.3, 0.05], "jitter_p": 0.5, "grey": 0.0,
        "blur": 0.25, "blur_sigma": [0.5, 1.5], "rotation": 15.0, "shift": 2,
    },
    "text": {
        "pooling": "mean", "max_length": 16, "model_dropout": 0.2, "mlm_weight": 0.3, "mlm_share": 0.2,
        "dev": "sts:dev.csv", "dev_every": 7, "dev_sha256": "ab", "model_sha256": "cd",
    },
    "graph": {"kinds": ["edge-perturb"], "ratio": 0.25, "keep": 0.5},
}  # fmt: skip


def with_table(name: str, table: dict[str, Any]) -> dict[str, Any]:
    return {"objective": {"moco": "moco", "text": "simcse", "graph": "graphcl"}.get(name, "simclr"), name: table}


def test_every_table_and_field_is_tried():
    assert {name: set(table.model_fields) for name, table in TABLES.items()} == {n: set(t) for n, t in FULL.items()}


@pytest.mark.parametrize(("table", "field"), [(table, field) for table in FULL for field in FULL[table]])
def test_identity_changes_with_each_field_of_each_table(table: str, field: str):
    least = {"augment": {"layer": "x"}, "freeze": {"part": "before", "layer": "x"}}.get(table, {})
    value = FULL[table][field]
    base = {**least, **({"kind": "augmented"} if field == "backward_rate" else {})}
    if field in ("dev", "dev_every", "dev_sha256"):
        base = {"dev": "sts:other.csv"}
    if field == "pairs":
        value = "one"
    before, after = (make_config(with_table(table, t)) for t in (base, {**base, field: value}))
    assert (before.identity() == after.identity()) == (field == "dev"), "where the dev pairs lie does not count"


@pytest.mark.parametrize("table", FULL)
def test_identity_changes_with_each_table(table: str):
    base = {"objective": {"moco": "moco", "text": "simcse", "graph": "graphcl"}.get(table, "simclr")}
    assert make_config(with_table(table, FULL[table])).identity() != make_config(base).identity()


def toml(settings: dict[str, Any]) -> str:
    """Strings, numbers, booleans and lists as JSON writes them are TOML too."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    tables = [f"\n[{key}]\n{toml(value)}" for key, value in settings.items() if isinstance(value, dict)]
    return "\n".join([*plain, *tables]) + "\n"


@pytest.mark.parametrize("table", FULL)
def test_each_table_comes_through_toml(tmp_path: Path, table: str):
    settings = with_table(table, FULL[table])
    path = tmp_path / "run.toml"
    path.write_text(toml(settings), "utf-8")
    assert read_config(path) == settings
    config = make_config(read_config(path))
    found = getattr(config, table).model_dump(mode="json")
    assert found == FULL[table]
    dumped = {key: value for key, value in config.model_dump(mode="json").items() if value is not None}
    dumped = {k: {f: x for f, x in v.items() if x is not None} if isinstance(v, dict) else v for k, v in dumped.items()}
    path.write_text(toml(dumped), "utf-8")
    again = make_config(read_config(path))
    assert again == config
    assert again.identity() == config.identity()


# --- init ---


def weights(folder: Path, epoch: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_state(folder / "checkpoints" / f"epoch-{epoch:04d}.safetensors")


@pytest.mark.parametrize("model", ["mlp,width=8,depth=2", "resnet20-cifar"])
@pytest.mark.parametrize(
    ("second", "fresh"),
    [
        ({"objective": "supervised"}, True),
        ({"objective": "simclr", "projection": 4}, True),
        ({"objective": "supcon"}, False),
        ({"objective": "moco", "moco": {"queue": 32}}, False),
    ],
    ids=["other kind", "other width", "supcon", "moco"],
)
def test_init_hands_on_everything_but_a_head_that_does_not_fit(
    tmp_path: Path, model: str, second: dict[str, Any], fresh: bool
):
    train(run_config(model=model), tmp_path / "first", dataset=tiny(), device="cpu")
    start = tmp_path / "first" / "checkpoints" / "epoch-0001.safetensors"
    chosen = run_config(model=model, init=str(start), seed=7, **second)
    train(chosen, tmp_path / "second", dataset=tiny(), device="cpu")
    given, _ = load_state(start)
    found, metadata = weights(tmp_path / "second", 0)
    assert metadata["fresh_head"] is fresh
    assert metadata["head"]["kind"] == ("linear" if second["objective"] == "supervised" else "projection")
    head = "fc." if model.startswith("mlp") else "linear."
    body = {name for name in given if not name.startswith(head)}
    assert body == {name for name in found if not name.startswith(head)}
    for name in body if fresh else given:
        assert torch.equal(found[name], given[name]), name
    if fresh:
        untrained = build_network(chosen, tiny()).state_dict()
        heads = {name for name in found if name.startswith(head)}
        assert heads
        assert all(torch.equal(found[name], untrained[name]) for name in heads)


def test_a_classifier_is_handed_on_to_a_classifier(tmp_path: Path):
    train(run_config(**SUPERVISED), tmp_path / "first", dataset=tiny(), device="cpu")
    start = tmp_path / "first" / "checkpoints" / "epoch-0001.safetensors"
    train(run_config(**SUPERVISED, init=str(start), seed=7), tmp_path / "second", dataset=tiny(), device="cpu")
    given, (found, metadata) = load_state(start)[0], weights(tmp_path / "second", 0)
    assert metadata["fresh_head"] is False
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert given.keys() == found.keys()


def test_a_run_without_init_says_nothing_about_a_head(tmp_path: Path):
    train(run_config(), tmp_path, dataset=tiny(), device="cpu")
    assert "fresh_head" not in weights(tmp_path, 1)[1]
