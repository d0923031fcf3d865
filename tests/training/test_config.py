"""Run configurations: what is allowed, what an error says, and when two runs are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerlens.augment.deep import DeepAugmentation
from layerlens.augment.views import Views
from layerlens.errors import ConfigError
from layerlens.training.config import AugmentConfig, RunConfig, ViewsConfig, make_config, read_config

OTHER: dict[str, Any] = {
    "objective": "supervised",
    "model": "mlp",
    "seed": 1,
    "epochs": 101,
    "batch_size": 128,
    "learning_rate": 0.5,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "warmup_epochs": 1.0,
    "temperature": 0.1,
    "loss_scale": 7.0,
    "projection": 64,
    "holdout": 0.0,
    "knn_every": 2,
    "keep_every": 5,
    "precision": "bf16-mixed",
    "accumulate": 2,
    "optimizer": "lars",
    "schedule": "linear",
    "clip": 0.5,
    "epoch_samples": 512,
    "text": {"pooling": "mean"},
    "graph": {"kinds": ["edge-perturb"]},
    "nesterov": True,
    "warmup_from": 0.01,
    "labels": 0.5,
    "train_samples": 500,
    "channels_last": False,
    "compile": True,
    "devices": 2,
    "input_augment": "erasing",
    "freeze": {"part": "before", "layer": "layer3"},
    "adalase": {},
    "dropout": {},
    "moco": {"queue": 512},
    "views": {"flip": 0.0},
    "augment": {"layer": "layer4"},
    "init_sha256": "a" * 64,
    "data_sha256": "b" * 64,
}


def test_the_defaults_are_a_simclr_run_on_digits():
    config = make_config({})
    assert (config.objective, config.model, config.data, config.seed) == ("simclr", "resnet18-cifar", "digits", 0)
    assert (config.epochs, config.batch_size, config.temperature, config.loss_scale) == (100, 256, 0.5, 1.0)
    assert (config.momentum, config.weight_decay, config.precision) == (0.9, 1e-4, "32-true")
    assert config.views is None
    assert config.augment is None


@pytest.mark.parametrize("batch_size", [64, 128, 256])
def test_the_learning_rate_follows_the_batch_size(batch_size: int):
    assert make_config({"batch_size": batch_size}).learning_rate == pytest.approx(0.06 * batch_size / 128)


def test_a_learning_rate_of_ones_own_is_kept():
    assert make_config({"learning_rate": 0.5}).learning_rate == 0.5


def test_augment_defaults_are_those_of_the_operator():
    """All but `stop_gradient`, which a configuration must turn on."""
    settings, operator = AugmentConfig(layer="layer4"), DeepAugmentation("layer4")
    for name in ("transform", "rate", "fraction", "components"):
        assert getattr(settings, name) == getattr(operator, name)


def test_views_defaults_are_those_of_the_views():
    assert Views(**ViewsConfig().model_dump()) == Views()


def test_a_configuration_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        make_config({}).epochs = 3


# --- identity ---


def test_every_field_is_tried():
    assert set(OTHER) | {"data", "init"} == set(RunConfig.model_fields)


@pytest.mark.parametrize("field", OTHER)
def test_identity_changes_with(field: str):
    base = {
        "objective": {"moco": "moco", "labels": "supcon", "text": "simcse", "graph": "graphcl"}.get(field, "simclr")
    }
    base = {} if field == "objective" else base
    assert make_config({**base, field: OTHER[field]}).identity() != make_config(base).identity()


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("augment", "layer", "layer3"),
        ("augment", "transform", "pca"),
        ("augment", "rate", 0.25),
        ("augment", "fraction", 1.0),
        ("augment", "stop_gradient", True),
        ("augment", "components", -1),
        ("views", "scale", 0.5),
        ("views", "ratio", 1.0),
        ("views", "flip", 0.0),
        ("views", "jitter", [0.0, 0.0, 0.0, 0.0]),
        ("views", "jitter_p", 0.5),
        ("views", "grey", 0.0),
    ],
)
def test_identity_changes_with_a_nested(section: str, field: str, value: Any):
    base = {"augment": {"layer": "layer4"}, "views": {}}
    changed = {**base, section: {**base[section], field: value}}
    assert make_config(changed).identity() != make_config(base).identity()


@pytest.mark.parametrize("field", ["init", "data"])
def test_identity_does_not_change_with_the_place_of(field: str):
    assert make_config({field: "elsewhere/file.npz"}).identity() == make_config({}).identity()


def test_identity_is_sixteen_hexadecimal_digits_and_stable():
    identity = make_config({}).identity()
    assert len(identity) == 16
    assert set(identity) <= set("0123456789abcdef")
    assert make_config({}).identity() == identity


def test_a_value_written_out_is_the_same_run_as_its_default():
    config = make_config({})
    again = make_config(config.model_dump(mode="json"))
    assert again == config
    assert again.identity() == config.identity()
    assert make_config({"learning_rate": 0.12, "warmup_epochs": 5}).identity() == config.identity()


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epocs": 3}, r"unknown setting 'epocs'; closest: epochs"),
        ({"augment": {"layer": "x", "rte": 0.1}}, r"unknown setting 'augment\.rte'; closest: rate"),
        ({"views": {"jiter": 0.1}}, r"unknown setting 'views\.jiter'; closest: jitter"),
        ({"zzz": 3}, r"unknown setting 'zzz'; allowed: objective, model"),
        (
            {"objective": "simclar"},
            r"objective='simclar' is unknown; closest: simclr, .* \(allowed: simclr, supcon, moco, supervised, simcse, "
            r"pairs, mlm, graphcl\)",
        ),
        ({"precision": "bf16"}, r"precision='bf16' is unknown; closest: bf16-mixed"),
        ({"augment": {"layer": "x", "transform": "pac"}}, r"augment\.transform='pac' is unknown; closest: pca"),
        ({"augment": {}}, r"augment\.layer.*field required"),
        ({"augment": "layer4"}, r"augment='layer4': allowed: a table"),
        ({"epochs": "many"}, r"epochs='many': input should be a valid integer"),
        ({"epochs": 1.5}, r"epochs=1\.5: input should be a valid integer"),
        ({"views": {"jitter": [0.4, 0.4]}}, r"views\.jitter"),
    ],
)
def test_an_error_says_what_came_and_what_is_allowed(settings: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match) as caught:
        make_config(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seed": -1}, "seed=-1: input should be greater than or equal to 0"),
        ({"epochs": 0}, "epochs=0: input should be greater than or equal to 1"),
        ({"batch_size": 3}, "batch_size=3: input should be greater than or equal to 4"),
        ({"learning_rate": 0}, "learning_rate=0: input should be greater than 0"),
        ({"momentum": 1.0}, r"momentum=1\.0: input should be less than 1"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001: input should be greater"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"temperature": 0.0}, "temperature=0.0: input should be greater than 0"),
        ({"loss_scale": 0.0}, "loss_scale=0.0: input should be greater than 0"),
        ({"projection": 1}, "projection=1: input should be greater than or equal to 2"),
        ({"holdout": 1.0}, "holdout=1.0: input should be less than 1"),
        ({"knn_every": 0}, "knn_every=0"),
        ({"keep_every": 0}, "keep_every=0"),
        ({"augment": {"layer": "x", "rate": 1.5}}, r"augment\.rate=1\.5: input should be less than or equal to 1"),
        ({"augment": {"layer": "x", "fraction": -0.5}}, r"augment\.fraction=-0\.5"),
        ({"augment": {"layer": "x", "components": 7}}, r"augment\.components=7"),
        ({"views": {"scale": 0.0}}, r"views\.scale=0\.0: input should be greater than 0"),
        ({"views": {"ratio": 0.5}}, r"views\.ratio=0\.5"),
        ({"views": {"flip": 2}}, r"views\.flip=2"),
        ({"views": {"grey": -1}}, r"views\.grey=-1"),
        ({"views": {"jitter_p": 1.1}}, r"views\.jitter_p=1\.1"),
    ],
)
def test_a_value_outside_its_range_is_refused(settings: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        make_config(settings)


def test_pca_without_a_component_is_refused_before_a_run_begins():
    with pytest.raises(ConfigError, match="components"):
        make_config({"augment": {"layer": "layer4", "transform": "pca", "components": 0}})


@pytest.mark.parametrize("jitter", [[-0.4, 0.4, 0.4, 0.1], [0.4, 0.4, 0.4, -0.1]])
def test_a_negative_jitter_is_refused(jitter: list[float]):
    with pytest.raises(ConfigError, match=r"views\.jitter"):
        make_config({"views": {"jitter": jitter}})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "temperature", "loss_scale", "warmup_epochs"])
def test_a_number_that_is_not_finite_is_refused(field: str, value: float):
    with pytest.raises(ConfigError, match=field):
        make_config({field: value})


# --- TOML ---


def test_a_toml_file_gives_nested_settings(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('epochs = 3\nmodel = "mlp"\n[augment]\nlayer = "blocks.1"\nstop_gradient = true\n', "utf-8")
    config = make_config(read_config(path))
    assert (config.epochs, config.model) == (3, "mlp")
    assert config.augment == AugmentConfig(layer="blocks.1", stop_gradient=True)


def test_a_toml_file_is_read_unchecked(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text("epocs = 3\n", "utf-8")
    assert read_config(str(path)) == {"epocs": 3}


def test_a_missing_toml_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"can't read the configuration '.*absent\.toml': No such file"):
        read_config(tmp_path / "absent.toml")


def test_a_folder_is_no_toml_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="can't read the configuration"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"epochs = \n", b"epochs = 1\nepochs = 2\n", b"\xff\xfe\x00"])
def test_an_invalid_toml_file_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml' is not valid TOML"):
        read_config(path)
