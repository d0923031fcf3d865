"""Which runs a study means, by hand; and keys: the same for the same work, another for any other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, DataError, LayerlensError
from layerlens.experiments.grid import Plan, PlannedRun, make_plan
from layerlens.experiments.study import make_study
from layerlens.training.loop import build_operators, resolve
from layerlens.training.network import build_start

RESNET = "resnet18-cifar,width=4"
MLP = "mlp,width=8,depth=2"


def tiny(seed: int = 0) -> Dataset:
    draws = np.random.default_rng(seed)
    x = draws.integers(0, 256, (48, 1, 8, 8)).astype(np.uint8)
    y = np.arange(48) % 4
    return dataset_from_arrays("tiny", x[:32], y[:32], x[32:], y[32:])


def load(spec: str) -> Dataset:
    """`tiny`, or `tiny:SEED`."""
    return tiny(int(spec.partition(":")[2] or 0))


def plan(base: dict[str, Any] | None = None, **content: Any) -> Plan:
    settings = {"model": MLP, "data": "tiny", "epochs": 2, "batch_size": 16, **(base or {})}
    return make_plan(make_study({"name": "s", "base": settings, **content}), load=load)


def key(base: dict[str, Any] | None = None, **content: Any) -> str:
    """Of a study with one run."""
    [run] = plan(base, **content).runs
    return run.key


def rows(made: Plan) -> list[tuple[Any, ...]]:
    return [(run.arm, *run.values.values(), run.seed) for run in made.runs]


# --- which runs ---


def test_a_study_without_axes_has_one_run_per_seed():
    made = plan(seeds=[3, 1])
    assert rows(made) == [("runs", 3), ("runs", 1)]
    assert [run.config.seed for run in made.runs] == [3, 1]
    assert all(run.values == {} and run.start is None and not run.baseline for run in made.runs)


def test_runs_are_the_product_of_shared_axes_own_axes_and_seeds():
    arms = [{"name": "base", "baseline": True}, {"name": "deep", "settings": {"augment": {"layer": "blocks.0"}}}]
    arms[1]["axes"] = {"augment.rate": [0.25, 0.5]}
    made = plan(seeds=2, axes={"momentum": [0.0, 0.9]}, arms=arms)
    assert rows(made) == [
        ("base", 0.0, 0), ("base", 0.0, 1), ("base", 0.9, 0), ("base", 0.9, 1),
        ("deep", 0.0, 0.25, 0), ("deep", 0.0, 0.25, 1), ("deep", 0.0, 0.5, 0), ("deep", 0.0, 0.5, 1),
        ("deep", 0.9, 0.25, 0), ("deep", 0.9, 0.25, 1), ("deep", 0.9, 0.5, 0), ("deep", 0.9, 0.5, 1),
    ]  # fmt: skip
    assert [run.baseline for run in made.runs] == [True] * 4 + [False] * 8
    assert made.runs[0].values == {"momentum": 0.0}
    assert made.runs[-1].values == {"momentum": 0.9, "rate": 0.5}
    assert made.runs[-1].config.augment is not None
    assert (made.runs[-1].config.augment.rate, made.runs[-1].config.momentum) == (0.5, 0.9)
    assert len(made.distinct) == len({run.key for run in made.runs}) == 12


def test_an_axis_counts_before_the_settings_of_its_arm_and_these_before_the_base():
    [run] = plan({"epochs": 5}, arms=[{"name": "a", "settings": {"epochs": 6}, "axes": {"epochs": [7]}}]).runs
    assert run.config.epochs == 7
    [run] = plan({"epochs": 5}, arms=[{"name": "a", "settings": {"epochs": 6}}]).runs
    assert run.config.epochs == 6


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("each layer", ["relu", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]),
        ("each layer but the last", ["relu", "layer1", "layer2", "layer3", "layer4", "avgpool"]),
        ("input and each layer", ["input", "relu", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]),
        ("input and each layer but the last", ["input", "relu", "layer1", "layer2", "layer3", "layer4", "avgpool"]),
    ],
)
@pytest.mark.parametrize("axis", ["augment.layer", "freeze.layer"])
def test_words_mean_the_layers_of_the_arms_network(words: str, layers: list[str], axis: str):
    settings: dict[str, Any] = {} if axis == "augment.layer" else {"freeze": {"part": "before", "layer": "relu"}}
    if axis == "freeze.layer" and (words.startswith("input") or not words.endswith("last")):
        with pytest.raises(LayerlensError, match=f"^s, runs, layer='{layers[0] if 'input' in words else 'fc'}'"):
            plan({"model": RESNET, **settings}, axes={axis: words})
        return
    made = plan({"model": RESNET, **settings}, axes={axis: words})
    assert [run.values["layer"] for run in made.runs] == layers


def test_words_mean_other_layers_in_another_arms_network():
    arms = [{"name": name, "settings": {"model": model}} for name, model in (("wide", RESNET), ("flat", MLP))]
    made = plan(axes={"augment.layer": "each layer"}, arms=arms)
    found = {arm: [run.values["layer"] for run in made.runs if run.arm == arm] for arm in ("wide", "flat")}
    assert found["wide"][:2] == ["relu", "layer1"]
    assert found["flat"][0].startswith("blocks.0")


def test_words_for_adalase_mean_what_its_kinds_can_augment():
    made = plan({"model": RESNET, "adalase": {"kinds": ["dropout"]}}, axes={"adalase.layers": "each layer"})
    assert [run.values["layer"] for run in made.runs] == ["relu", "layer1", "layer2", "layer3", "layer4", "avgpool"]


def test_words_for_adalase_mean_other_layers_in_an_arm_of_other_kinds():
    arms = [
        {"name": kind, "settings": {"adalase": {"kinds": [kind]}}, "axes": {"adalase.layers": "each layer"}}
        for kind in ("cutout", "dropout")
    ]
    made = plan({"model": RESNET}, arms=arms)
    assert "avgpool" in [run.values["layer"] for run in made.runs if run.arm == "dropout"]


def test_words_for_dropout_are_refused_or_mean_layers_that_it_can_drop():
    base = {"model": RESNET, "objective": "supervised", "dropout": {}}
    try:
        made = plan(base, axes={"dropout.layers": "each layer"})
    except ConfigError:
        return
    for run in made.runs:
        start = build_start(run.config, tiny())
        build_operators(run.config, start.network, start.example)


def test_words_that_mean_nothing_say_whose():
    with pytest.raises(LayerlensError, match="each layer"):
        plan({"model": RESNET, "adalase": {"kinds": ["dropout"], "layers": "input"}}, axes={}, arms=[
            {"name": "one", "axes": {"adalase.layers": "each layer but the last"}}
        ])  # fmt: skip


def test_starts_are_one_for_each_seed_and_each_value_of_the_shared_axes():
    made = plan(
        seeds=2, axes={"momentum": [0.0, 0.9]}, starts={"pre": {"epochs": 5}, "unused": {"epochs": 6}},
        arms=[{"name": "frozen", "start": "pre", "settings": {"freeze": {"part": "before"}},
               "axes": {"freeze.layer": ["blocks.0", "blocks.1"]}}, {"name": "free"}],
    )  # fmt: skip
    starts = {run.key: run for run in made.runs if run.arm == "pre"}
    assert [(run.values["momentum"], run.seed) for run in starts.values()] == [(0.0, 0), (0.0, 1), (0.9, 0), (0.9, 1)]
    assert rows(made)[:4] == [("pre", 0.0, 0), ("pre", 0.0, 1), ("pre", 0.9, 0), ("pre", 0.9, 1)], "starts come first"
    frozen = [run for run in made.runs if run.arm == "frozen"]
    assert len(frozen) == 8
    for run in frozen:
        assert run.start is not None
        origin = starts[run.start]
        assert (origin.seed, origin.values["momentum"]) == (run.seed, run.values["momentum"])
        assert (origin.config.epochs, origin.config.momentum) == (5, run.config.momentum)
    assert all(run.start is None for run in made.runs if run.arm in ("free", "pre"))
    assert "unused" not in {run.arm for run in made.runs}


def test_words_on_a_shared_axis_that_mean_other_layers_in_a_start_are_an_error_of_ours():
    with pytest.raises(LayerlensError):
        plan(
            {"model": RESNET}, axes={"augment.layer": "each layer"}, starts={"pre": {"model": MLP}},
            arms=[{"name": "a", "start": "pre"}],
        )  # fmt: skip


def test_runs_that_two_arms_share_are_one_with_everything_that_either_wants_measured():
    arms = [{"name": "a"}, {"name": "b", "transfer": ["tiny:1"]}]
    made = plan(arms=arms)
    assert len(made.runs) == 2
    [(only, run)] = made.distinct.items()
    assert {r.key for r in made.runs} == {only}
    assert len(made.runs[0].measured) == 2
    assert set(run.measured) == set(made.runs[1].measured)
    assert [(m.kind, m.data) for m in run.measured] == [("cka", None), ("scores", None), ("scores", "tiny:1")]


def test_what_is_measured_has_a_file_of_its_own_for_each_setting_and_each_data():
    def files(**content: Any) -> set[str]:
        return {m.file for m in plan(**content).runs[0].measured}

    usual = files()
    assert len(usual) == 2
    assert len(files(measure={"k": 5}) & usual) == 1, "only the scores depend on k"
    assert not files(measure={"batch_size": 50}) & usual, "views are drawn batch by batch, so the geometry moves too"
    assert not files(measure={"samples": 50}) & usual
    assert not files(base={"data": "tiny:1"}) & usual
    assert files(measure={"scores": False}) < usual
    assert files(measure={"scores": False, "cka": False}) == set()
    assert files(arms=[{"name": "a", "transfer": ["tiny:2"]}]) > usual
    assert all(re.fullmatch(r"analysis/study-(scores|cka)-[0-9a-f]{12}\.json", name) for name in usual)


# --- keys ---

OTHER: dict[str, dict[str, Any]] = {
    "objective": {"objective": "supcon"}, "model": {"model": "mlp,width=9,depth=2"}, "seed": {},
    "epochs": {"epochs": 3}, "batch_size": {"batch_size": 8}, "accumulate": {"accumulate": 2},
    "optimizer": {"optimizer": "lars"},
    "learning_rate": {"learning_rate": 0.5}, "momentum": {"momentum": 0.8}, "nesterov": {"nesterov": True},
    "weight_decay": {"weight_decay": 0.0}, "warmup_epochs": {"warmup_epochs": 1.0}, "temperature": {"temperature": 0.3},
    "projection": {"projection": 64}, "train_samples": {"train_samples": 20}, "holdout": {"holdout": 0.2},
    "keep_every": {"keep_every": 1}, "precision": {"precision": "bf16-mixed"}, "views": {"views": {"grey": 0.5}},
    "augment": {"augment": {"layer": "blocks.0"}}, "augment.rate": {"augment": {"layer": "blocks.0", "rate": 0.25}},
    "augment.stop": {"augment": {"layer": "blocks.0", "stop_gradient": True}},
    "augment.layer": {"augment": {"layer": "blocks.1"}}, "freeze": {"freeze": {"part": "before", "layer": "blocks.0"}},
    "freeze.part": {"freeze": {"part": "after", "layer": "blocks.0"}}, "input": {"input_augment": "erasing"},
    "data": {"data": "tiny:1"},
}  # fmt: skip


def test_any_other_setting_gives_another_key():
    keys = {name: key(settings, seeds=[1] if name == "seed" else 1) for name, settings in OTHER.items()}
    keys["none"] = key()
    assert len(set(keys.values())) == len(OTHER) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in keys.values())


def test_the_same_run_has_the_same_key_in_every_study():
    """As an axis, as a setting, written as another type, under another name, beside others."""
    expected = key({"learning_rate": 1.0, "augment": {"layer": "blocks.0", "rate": 0.5}})
    others = [
        plan({"augment": {"layer": "blocks.0"}}, axes={"learning_rate": [1]}),
        plan({"learning_rate": 1}, arms=[{"name": "x", "settings": {"augment": {"rate": 0.5}},
                                          "axes": {"augment.layer": ["blocks.0"]}, "transfer": ["tiny:1"]}]),
        plan({"learning_rate": 1.0, "augment": {"layer": "blocks.0"}}, measure={"k": 3}, about="another"),
        plan({"learning_rate": 7.0, "augment": {"layer": "blocks.1"}}, axes={"augment.rate": [0.5]},
             arms=[{"name": "y", "settings": {"learning_rate": 1.0, "augment": {"layer": "blocks.0"}}}]),
    ]  # fmt: skip
    assert [run.key for made in others for run in made.runs] == [expected] * len(others)


def test_what_is_left_out_counts_like_its_usual_value():
    assert key({"momentum": 0.9, "learning_rate": 0.06 * 16 / 128, "temperature": 0.5, "labels": 1.0}) == key()


def test_the_key_of_a_run_without_a_start_is_its_identity():
    [run] = plan({"objective": "moco"}).runs
    assert run.key == run.config.identity() == resolve(run.config, tiny()).identity()
    assert run.config.data_sha256 == tiny().fingerprint()


FROZEN = {"name": "frozen", "start": "pre", "settings": {"freeze": {"part": "before", "layer": "blocks.0"}}}


def test_the_key_of_a_run_changes_with_the_run_that_it_starts_from():
    def keys(start: dict[str, Any]) -> tuple[str, str]:
        first, second = plan(starts={"pre": start}, arms=[FROZEN]).runs
        assert second.start == first.key
        return first.key, second.key

    usual, longer, same = keys({}), keys({"epochs": 9}), keys({"epochs": 2})
    assert usual == same
    assert usual[0] != longer[0]
    assert usual[1] != longer[1]
    [alone] = plan(arms=[{**FROZEN, "start": None}]).runs
    assert alone.key not in (usual[1], longer[1])


def test_a_start_is_the_same_run_as_an_arm_with_its_settings():
    made = plan(starts={"pre": {}}, arms=[{"name": "free"}, FROZEN])
    assert [run.key for run in made.runs if run.arm == "pre"] == [run.key for run in made.runs if run.arm == "free"]
    assert len(made.distinct) == 2


def test_a_further_seed_or_value_leaves_all_other_keys():
    content: dict[str, Any] = {"starts": {"pre": {}}, "arms": [{"name": "free"}, FROZEN]}
    small = {run.key for run in plan(seeds=2, axes={"momentum": [0.5]}, **content).runs}
    seeds = {run.key for run in plan(seeds=3, axes={"momentum": [0.5]}, **content).runs}
    values = {run.key for run in plan(seeds=2, axes={"momentum": [0.1, 0.5]}, **content).runs}
    assert (len(small), len(seeds), len(values)) == (4, 6, 8)
    assert small < seeds
    assert small < values


def npz(path: Path, data: Dataset) -> str:
    assert data.y_train is not None
    assert data.y_test is not None
    np.savez(path, x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)
    return f"npz:{path}"


def test_the_place_of_the_data_does_not_count_but_what_it_holds_does(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    one, same = npz(tmp_path / "a.npz", tiny()), npz(tmp_path / "elsewhere" / "b.npz", tiny())
    other, labels = npz(tmp_path / "c.npz", tiny(1)), tiny()
    assert labels.y_train is not None
    labels.y_train[0] = 3
    changed = npz(tmp_path / "d.npz", labels)
    keys = []
    for spec in (one, same, other, changed, f"{one},normalize=none"):
        [run] = make_plan(make_study({"name": "s", "base": {"model": MLP, "data": spec, "batch_size": 16}})).runs
        keys.append(run.key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_data_that_are_not_there_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.npz.*x_train"):
        make_plan(make_study({"name": "s", "base": {"data": f"npz:{tmp_path}/none.npz"}}))


def test_each_data_set_is_loaded_once_and_handed_on():
    loaded: list[str] = []

    def counting(spec: str) -> Dataset:
        loaded.append(spec)
        return load(spec)

    arms = [{"name": "a", "transfer": ["tiny:1"]}, {"name": "b", "settings": {"data": "tiny:1"}}]
    base = {"model": MLP, "data": "tiny", "batch_size": 16}
    made = make_plan(make_study({"name": "s", "seeds": 3, "base": base, "arms": arms}), load=counting)
    assert sorted(loaded) == ["tiny", "tiny:1"]
    assert sorted(made.datasets) == ["tiny", "tiny:1"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"axes": {"batch_size": [16, 3]}}, r"^s, runs, batch_size=3: batch_size=3: input should be"),
        (
            {"arms": [{"name": "deep", "settings": {"augment": {"layer": "input"}},
                       "axes": {"augment.rate": [0.5, 1.5], "augment.fraction": [0.5]}}]},
            r"^s, deep, rate=1\.5, fraction=0\.5: augment\.rate=1\.5: ",
        ),
        (
            {"axes": {"momentum": [0.9]}, "arms": [{"name": "frozen", "settings": {"freeze": {"part": "before"}}}]},
            r"^s, frozen, momentum=0\.9: \[freeze\] needs layer",
        ),
        ({"starts": {"pre": {"epochs": 0}}, "arms": [{"name": "a", "start": "pre"}]}, r"^s, pre: epochs=0: "),
        (
            {"axes": {"momentum": [0.0, 0.9]}, "arms": [{"name": "n", "settings": {"nesterov": True}}]},
            r"^s, n, momentum=0\.0: nesterov=true needs momentum",
        ),
    ],
)  # fmt: skip
def test_a_combination_that_no_run_can_have_names_its_arm_and_values(content: dict[str, Any], line: str):
    with pytest.raises(ConfigError, match=line) as caught:
        plan(**content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"model": "nonsense"}])
def test_a_combination_with_layers_in_words_names_its_arm_too(settings: dict[str, Any]):
    with pytest.raises(LayerlensError, match=r"^s, deep"):
        plan(settings, arms=[{"name": "deep", "axes": {"augment.layer": "each layer"}}])


def test_an_error_of_another_kind_keeps_its_kind_and_gets_the_label():
    with pytest.raises(LayerlensError, match=r"^s, a: ") as caught:
        plan(arms=[{"name": "a", "settings": {"init": "/nowhere.safetensors"}}])
    assert type(caught.value).__name__ == "CheckpointError"


# --- order ---

ORDER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_grid
made = test_grid.whole()
rows = [[r.key, r.arm, r.start, r.values, r.seed, [m.file for m in r.measured]] for r in made.runs]
print(json.dumps(rows))
print(json.dumps(list(made.distinct)))
"""


def whole() -> Plan:
    return plan(
        {"model": RESNET}, seeds=2, axes={"momentum": [0.9, 0.0]}, starts={"pre": {"epochs": 4}, "too": {"epochs": 3}},
        arms=[
            {"name": "frozen", "start": "pre", "settings": {"freeze": {"part": "before"}},
             "axes": {"freeze.layer": "each layer but the last"}, "transfer": ["tiny:2", "tiny:1"]},
            {"name": "deep", "start": "too", "settings": {"augment": {}},
             "axes": {"augment.stop_gradient": [True, False], "augment.layer": "input and each layer"}},
        ],
    )  # fmt: skip


def test_keys_and_order_are_the_same_in_every_process():
    def told(hash_seed: str) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", ORDER, str(Path(__file__).parent)], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    made = whole()
    here = [
        [[run.key, run.arm, run.start, run.values, run.seed, [m.file for m in run.measured]] for run in made.runs],
        list(made.distinct),
    ]
    assert len(here[0]) == 2 * (2 + 2 + 2 * 6 + 2 * 16)
    assert told("1") == here, "this process has a hash seed of its own"


def test_every_run_of_a_plan_is_what_it_says():
    """The values of each row are those of its configuration."""
    fields = {"momentum": lambda c: c.momentum, "stop_gradient": lambda c: c.augment.stop_gradient}

    def layer(run: PlannedRun) -> Any:
        table = run.config.freeze or run.config.augment
        return table.layer if table is not None else None

    for run in whole().runs:
        assert run.config.seed == run.seed
        for name, value in run.values.items():
            assert (layer(run) if name == "layer" else fields[name](run.config)) == value
