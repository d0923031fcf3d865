"""What a study file may say, what it is told when it says something else, and how its sizes are laid over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerlens.errors import ConfigError, UnknownNameError
from layerlens.experiments.study import WORDS, Arm, Measure, Study, axis_name, make_study, read_study
from layerlens.training.config import TABLES, RunConfig, make_config, overlay
from layerlens.training.recipes import read_recipe


def study(**content: Any) -> Study:
    return make_study({"name": "s", **content})


def refused(**content: Any) -> str:
    """The one line that a study gets as an answer."""
    with pytest.raises(ConfigError) as caught:
        study(**content)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- what may be left out ---


def test_a_study_needs_no_more_than_a_name():
    made = study()
    assert made.arms == (Arm(name="runs"),)
    assert (made.seed_list, made.base, made.axes, made.starts, made.figures) == ((0,), {}, {}, {}, ())
    assert made.measure == Measure(scores=True, cka=True, k=200, protocol=None, samples=1000, batch_size=100)


def test_a_study_without_a_name_says_so():
    with pytest.raises(ConfigError, match="name"):
        make_study({})


@pytest.mark.parametrize("name", ["a b", "../up", "", "x/y", ".hidden", "a" * 101, "line\n"])
def test_a_name_that_is_no_folder_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"^name="):
        make_study({"name": name})


def test_a_study_can_not_be_changed_once_it_is_checked():
    with pytest.raises(ValueError, match="frozen"):
        study().seeds = 5  # type: ignore[misc]


# --- typing errors, at each level ---


@pytest.mark.parametrize(
    ("content", "place", "meant"),
    [
        ({"sedes": 3}, "sedes", "seeds"),
        ({"figure": []}, "figure", "figures"),
        ({"arms": [{"name": "a", "setings": {}}]}, "arms.0.setings", "settings"),
        ({"arms": [{"name": "a"}, {"name": "b", "baselin": True}]}, "arms.1.baselin", "baseline"),
        ({"measure": {"sample": 3}}, "measure.sample", "samples"),
        ({"figures": [{"kind": "sweep", "name": "x", "metrics": "knn"}]}, "figures.0.metrics", "metric"),
        ({"scales": {"smoke": {"seds": 2}}}, "scales.smoke.seds", "seeds"),
        ({"scales": {"published": {"recipes": "x"}}}, "scales.published.recipes", "recipe"),
    ],
)
def test_an_unknown_key_is_answered_with_its_place_and_the_closest_ones(
    content: dict[str, Any], place: str, meant: str
):
    line = refused(**content)
    assert line.startswith(f"unknown setting {place!r}; closest: ")
    assert meant in line.partition("closest: ")[2].split(", ")


@pytest.mark.parametrize(
    ("content", "where", "key", "meant"),
    [
        ({"base": {"epoch": 3}}, "base", "epoch", "epochs"),
        ({"base": {"augment": {"lyer": "layer1"}}}, "base", "augment.lyer", "layer"),
        ({"starts": {"pre": {"modle": "mlp"}}}, "start 'pre'", "modle", "model"),
        ({"arms": [{"name": "deep", "settings": {"freeze": {"prt": "after"}}}]}, "arm 'deep'", "freeze.prt", "part"),
        ({"scales": {"hour": {"base": {"batchsize": 8}}}}, "scale 'hour'", "batchsize", "batch_size"),
    ],
)
def test_an_unknown_setting_is_answered_with_whose_it_is_and_the_closest_ones(
    content: dict[str, Any], where: str, key: str, meant: str
):
    line = refused(**content)
    assert line.startswith(f"{where}: unknown setting {key!r}; closest: ")
    assert meant in line.partition("closest: ")[2].split(", ")


def test_a_scale_of_another_name_is_refused():
    assert refused(scales={"smoek": {}}) == "scale 'smoek' is unknown; closest: smoke"


@pytest.mark.parametrize("part", ["arms", "transfer"])
def test_a_scale_for_an_arm_that_is_not_there_names_the_closest(part: str):
    value: Any = {"epochs": 1} if part == "arms" else ["digits"]
    line = refused(arms=[{"name": "frozen"}], scales={"smoke": {part: {"frozne": value}}})
    assert line == "scale 'smoke': no arm 'frozne'; closest: frozen"


def test_an_unknown_kind_of_figure_lists_those_that_there_are():
    line = refused(figures=[{"kind": "swep", "name": "x"}])
    assert line.startswith("figures.0.kind='swep' is unknown; closest: sweep")
    assert line.endswith("(allowed: sweep, epochs, similarity, geometry, grid, freeze)")


def test_a_typing_error_in_an_arm_of_a_scale_is_found_before_that_scale_is_used():
    assert "epochs" in refused(arms=[{"name": "a"}], scales={"smoke": {"arms": {"a": {"epoch": 3}}}})


def test_a_typing_error_in_what_a_scale_measures_is_found_before_that_scale_is_used():
    assert "samples" in refused(scales={"smoke": {"measure": {"sampels": 3}}})


@pytest.mark.parametrize("name", ["../../elsewhere", "A b", "x/y"])
def test_a_figure_can_not_be_named_out_of_its_folder(name: str):
    assert "name" in refused(figures=[{"kind": "sweep", "name": name}])


@pytest.mark.parametrize("name", ["", "UPPER", "-"])
def test_a_figure_needs_a_name_that_a_file_can_have(name: str):
    assert refused(figures=[{"kind": "sweep", "name": name}]).startswith("figures.0.name=")


# --- axes ---


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("augment.lyer", "augment.layer"), ("augment.stop_gradients", "augment.stop_gradient"), ("epoch", "epochs"),
        ("layer", "augment.layer"), ("augment", "augment.rate"), ("freeze.lyer", "freeze.layer"),
    ],
)  # fmt: skip
def test_an_axis_over_an_unknown_field_names_the_closest_ones(field: str, meant: str):
    line = refused(axes={field: [1]})
    assert line.startswith(f"axis over unknown field {field!r}; closest: ")
    assert meant in line.partition("closest: ")[2].split(", ")


def test_the_short_name_of_an_axis_is_answered_with_the_fields_that_end_so():
    assert "augment.rate" in refused(axes={"rate": [0.5]})


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ({"arms": [{"name": "deep", "axes": {"epoch": [1]}}]}, "arm 'deep': axis over unknown field 'epoch'"),
        (
            {"axes": {"epochs": [1]}, "scales": {"smoke": {"axes": {"epoch": [1]}}}},
            "scale 'smoke': axis over unknown field 'epoch'",
        ),
    ],
)
def test_an_axis_over_an_unknown_field_says_where_it_stands(content: dict[str, Any], start: str):
    assert refused(**content).startswith(start)


def test_every_field_of_a_run_but_those_that_the_study_fills_in_can_be_an_axis():
    refused_ones = {"seed", "init", "init_sha256", "data_sha256"}
    for name, field in RunConfig.model_fields.items():
        if name in refused_ones or name in TABLES:
            assert name in refused(axes={name: [0]})
        else:
            assert study(axes={name: [field.default]}).axes == {name: [field.default]}


@pytest.mark.parametrize(
    ("field", "hint"), [("seed", "use seeds"), ("init", "use starts"), ("data_sha256", "use seeds")]
)
def test_what_the_study_fills_in_is_no_axis(field: str, hint: str):
    assert refused(axes={field: [1]}) == f"axis over {field!r}; {hint}"


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("field", ["augment.layer", "freeze.layer", "adalase.layers"])
def test_layers_may_be_said_in_words(field: str, words: str):
    assert study(axes={field: words}).axes == {field: words}


@pytest.mark.parametrize("words", ["every layer", "each layers", "each layer but the first", ""])
def test_other_words_are_answered_with_those_that_are_known(words: str):
    line = refused(axes={"augment.layer": words})
    assert line.startswith(f"axis 'augment.layer' = {words!r}; ")
    assert line.endswith(", or a list")
    assert "each layer but the last" in line


def test_words_are_for_layers_alone():
    assert refused(axes={"epochs": "each layer"}) == "axis 'epochs' = 'each layer'; allowed: a list"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("epochs", []), ("epochs", [1, 2, 1]), ("learning_rate", [1, 1.0]), ("augment.layer", ["layer1", "layer1"]),
        ("adalase.ratios", [[0.5, 0.5], [0.5, 0.5]]),
    ],
)  # fmt: skip
def test_an_axis_needs_values_that_differ(field: str, values: list[Any]):
    assert refused(axes={field: values}) == f"axis {field!r} = {values!r}; allowed: a list of different values"


def test_one_axis_can_not_stand_in_two_places():
    line = refused(axes={"augment.rate": [0.1]}, arms=[{"name": "a", "axes": {"augment.rate": [0.2]}}])
    assert line == "arm 'a': ['augment.rate'] are axes of the whole study already"


def test_two_axes_with_the_same_short_name_are_refused():
    line = refused(axes={"augment.layer": ["layer1"], "freeze.layer": ["layer1"]})
    assert line == "axes 'augment.layer' and 'freeze.layer' would have the same name in tables"
    assert "would have the same name" in refused(
        arms=[{"name": "a", "axes": {"adalase.layers": ["auto"], "dropout.layers": ["auto"]}}]
    )


def test_an_axis_of_an_arm_and_one_of_the_study_with_the_same_short_name_are_refused():
    line = refused(axes={"augment.layer": ["layer1"]}, arms=[{"name": "a", "axes": {"freeze.layer": ["layer2"]}}])
    assert "same name" in line


def test_two_arms_may_have_axes_of_the_same_short_name():
    arms = [{"name": "a", "axes": {"augment.layer": ["layer1"]}}, {"name": "b", "axes": {"freeze.layer": ["layer1"]}}]
    assert len(study(arms=arms).arms) == 2


@pytest.mark.parametrize("values", [0.5, {"rate": [0.5]}], ids=["a number", 'the dotted key augment.rate without ""'])
def test_an_axis_that_is_no_list_is_told_to_be_one(values: Any):
    line = refused(axes={"augment.rate": values} if isinstance(values, float) else {"augment": values})
    assert "list" in line
    assert ".str" not in line


def test_the_short_name_of_an_axis():
    assert [axis_name(f) for f in ("epochs", "augment.rate", "dropout.layers")] == ["epochs", "rate", "layer"]


# --- seeds ---


@pytest.mark.parametrize(("seeds", "every"), [(1, (0,)), (3, (0, 1, 2)), ([4, 2], (4, 2)), ([0], (0,))])
def test_seeds_are_how_many_or_which(seeds: Any, every: tuple[int, ...]):
    assert study(seeds=seeds).seed_list == every


@pytest.mark.parametrize("seeds", [0, -3, [], [1, 1], [0, -1]])
def test_seeds_that_are_none_twice_or_below_zero_are_refused(seeds: Any):
    line = refused(seeds=seeds)
    assert line == f"seeds={seeds}: allowed: how many, from 1, or a list of different numbers from 0"


@pytest.mark.parametrize("seeds", ["five", 1.5, None])
def test_seeds_that_are_no_numbers_are_refused(seeds: Any):
    assert refused(seeds=seeds).startswith("seeds")


@pytest.mark.parametrize("key", ["seed", "data_sha256", "init_sha256"])
@pytest.mark.parametrize("where", ["base", "start", "arm", "scale"])
def test_what_the_study_fills_in_is_no_setting(key: str, where: str):
    settings = {key: 1}
    content: dict[str, dict[str, Any]] = {
        "base": {"base": settings}, "start": {"starts": {"x": settings}},
        "arm": {"arms": [{"name": "x", "settings": settings}]}, "scale": {"scales": {"smoke": {"base": settings}}},
    }  # fmt: skip
    line = refused(**content[where])
    assert f"{key!r} is filled in by the study" in line
    assert line.endswith("; set seeds") == (key == "seed")


@pytest.mark.parametrize("seeds", [0, []])
def test_no_seeds_at_a_scale_are_refused(seeds: Any):
    line = refused(seeds=3, scales={"smoke": {"seeds": seeds}})
    assert line == f"scales.smoke.seeds={seeds}: allowed: how many, from 1, or a list of different numbers from 0"


# --- arms and starts ---


def test_arms_need_names_that_differ():
    assert "arms need names that differ" in refused(arms=[{"name": "a"}, {"name": "a"}])
    assert "there must be one" in refused(arms=[])
    assert refused(arms=[{}]).startswith("arms.0.name")
    assert refused(arms=[{"name": ""}]).startswith("arms.0.name")


def test_an_arm_and_a_start_can_not_have_the_same_name():
    line = refused(starts={"a": {}}, arms=[{"name": "a"}])
    assert line == "['a'] name an arm and a start; give them different names"


def test_an_arm_starts_from_a_start_that_is_there():
    line = refused(starts={"simclr": {}}, arms=[{"name": "deep", "start": "simclar"}])
    assert line == "arm 'deep': start='simclar' is unknown; closest: simclr"
    assert study(starts={"simclr": {}}, arms=[{"name": "deep", "start": "simclr"}]).arms[0].start == "simclr"


# --- sizes ---

SIZED: dict[str, Any] = {
    "seeds": 2,
    "base": {"epochs": 50, "momentum": 0.5, "augment": {"rate": 0.1, "layer": "layer4"}},
    "axes": {"learning_rate": [0.1, 0.2, 0.3], "weight_decay": [0.0, 1e-4]},
    "starts": {"pre": {"epochs": 9, "momentum": 0.0}},
    "arms": [
        {
            "name": "a", "start": "pre", "settings": {"batch_size": 8, "nesterov": True},
            "axes": {"augment.fraction": [0.1, 0.2]}, "transfer": ["digits"],
        },
        {"name": "b", "axes": {"augment.fraction": [0.3]}, "transfer": ["svhn"]},
    ],
    "measure": {"k": 5, "samples": 64},
    "scales": {
        "smoke": {
            "base": {"epochs": 3, "augment": {"rate": 0.2}}, "seeds": [7], "measure": {"k": 3},
            "axes": {"learning_rate": [1.0], "augment.fraction": [0.5, 0.6]},
            "arms": {"a": {"batch_size": 16}, "pre": {"epochs": 1}}, "transfer": {"a": ["cifar10:x"]},
        },
        "published": {"recipe": "simclr-cifar", "base": {"epochs": 800}},
    },
}  # fmt: skip


def test_the_options_lie_over_the_scale_which_lies_over_the_base():
    made = study(**SIZED).at_scale("smoke", momentum=0.7, augment={"fraction": 0.25})
    assert made.base == {
        "epochs": 3, "momentum": 0.7, "augment": {"rate": 0.2, "layer": "layer4", "fraction": 0.25},
    }  # fmt: skip
    assert study(**SIZED).at_scale("smoke", epochs=4).base["epochs"] == 4


def test_a_scale_replaces_axes_wherever_they_stand_and_leaves_the_others():
    made = study(**SIZED).at_scale("smoke")
    assert made.axes == {"learning_rate": [1.0], "weight_decay": [0.0, 1e-4]}
    assert [arm.axes for arm in made.arms] == [{"augment.fraction": [0.5, 0.6]}] * 2


def test_a_scale_changes_seeds_measure_arms_starts_and_transfer():
    made = study(**SIZED).at_scale("smoke")
    assert made.seed_list == (7,)
    assert (made.measure.k, made.measure.samples) == (3, 64)
    assert [arm.settings for arm in made.arms] == [{"batch_size": 16, "nesterov": True}, {}]
    assert made.starts == {"pre": {"epochs": 1, "momentum": 0.0}}
    assert [arm.transfer for arm in made.arms] == [("cifar10:x",), ("svhn",)]
    assert (made.name, made.scales) == ("s-smoke", {})


def test_the_recipe_of_a_scale_lies_below_the_base():
    made, recipe = study(**SIZED).at_scale("published"), read_recipe("simclr-cifar")
    assert made.base["batch_size"] == recipe["batch_size"] == 1024
    assert (made.base["momentum"], made.base["epochs"]) == (0.5, 800)
    assert made.seed_list == (0, 1)
    assert make_config({**made.base, "seed": 0}).epochs == 800


def test_without_a_scale_a_study_stays_as_it_is_but_for_the_options():
    whole = study(**SIZED)
    assert whole.at_scale(None).model_dump(exclude={"scales"}) == whole.model_dump(exclude={"scales"})
    assert whole.at_scale(None, model="mlp").base == {**whole.base, "model": "mlp"}
    assert whole.base["epochs"] == 50, "the study itself is not changed"


def test_sizes_leave_the_study_that_they_are_made_from_as_it_is():
    whole = study(**SIZED)
    before = whole.model_dump()
    whole.at_scale("smoke", augment={"rate": 0.9})
    assert whole.model_dump() == before


def test_a_scale_that_a_study_does_not_have_is_refused():
    with pytest.raises(UnknownNameError, match="unknown scale 'hour'; allowed: smoke, published"):
        study(**SIZED).at_scale("hour")


def test_an_option_that_no_run_has_names_the_closest():
    with pytest.raises(ConfigError, match="base: unknown setting 'epoch'; closest: epochs"):
        study(**SIZED).at_scale("smoke", epoch=3)
    with pytest.raises(ConfigError, match="'seed' is filled in by the study; set seeds"):
        study(**SIZED).at_scale(None, seed=3)


def test_a_scale_can_not_bring_axes_that_the_study_lacks():
    line = refused(axes={"augment.rate": [0.1]}, scales={"smoke": {"axes": {"augment.fraction": [1.0]}}})
    assert line.startswith("scale 'smoke': ['augment.fraction'] are no axes of this study; ")


# --- files ---


def write(tmp_path: Path, text: str | bytes, name: str = "mine.toml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_says_what_an_object_says(tmp_path: Path):
    path = write(
        tmp_path,
        """
        about = "rates"
        seeds = [0, 2]
        [base]
        epochs = 3
        augment.layer = "layer4"
        [axes]
        "augment.rate" = [0.1, 0.5]
        [[arms]]
        name = "SimCLR"
        baseline = true
        [[arms]]
        name = "deep"
        settings.batch_size = 64
        [scales.smoke]
        seeds = 1
        """,
    )
    arms = [{"name": "SimCLR", "baseline": True}, {"name": "deep", "settings": {"batch_size": 64}}]
    assert read_study(path) == make_study(
        {
            "name": "mine",
            "about": "rates",
            "seeds": [0, 2],
            "base": {"epochs": 3, "augment": {"layer": "layer4"}},
            "axes": {"augment.rate": [0.1, 0.5]},
            "arms": arms,
            "scales": {"smoke": {"seeds": 1}},
        }
    )
    assert read_study(str(path)).name == "mine"


def test_a_name_in_the_file_counts_before_that_of_the_file(tmp_path: Path):
    assert read_study(write(tmp_path, 'name = "other"')).name == "other"


def test_a_file_needs_no_toml_at_its_end(tmp_path: Path):
    assert read_study(write(tmp_path, "seeds = 2", "plain")).seed_list == (0, 1)


@pytest.mark.parametrize("text", ["seeds = ", "[base\n", b"\xff\xfe\x00", "a = 1\na = 2\n", "\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str | bytes):
    with pytest.raises(ConfigError, match=r"mine\.toml' is not valid TOML: "):
        read_study(write(tmp_path, text))


def test_a_typing_error_in_a_file_names_the_closest_key(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown setting 'sedes'; closest: seeds"):
        read_study(write(tmp_path, "sedes = 3"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"can't read the configuration '.*none\.toml': No such file"):
        read_study(tmp_path / "none.toml")


def test_a_folder_is_no_study_file(tmp_path: Path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"can't read the configuration '.*folder\.toml': Is a directory"):
        read_study(tmp_path / "folder.toml")


def test_a_ready_study_that_is_not_there_is_refused():
    with pytest.raises(UnknownNameError, match="unknown study 'freez-ablation'"):
        read_study("freez-ablation")


# --- what studies share with runs ---


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'; closest: epochs, warmup_epochs, epoch_samples"),
        ({"augment": {"layer": "a", "rat": 1}}, "unknown setting 'augment.rat'; closest: rate, fraction"),
        (
            {"objective": "simclar"},
            "objective='simclar' is unknown; closest: simclr, simcse, mlm (allowed: simclr, supcon, moco, supervised, "
            "simcse, pairs, mlm, graphcl)",
        ),
        ({"epochs": 0}, "epochs=0: input should be greater than or equal to 1"),
        ({"freeze": "layer1"}, "freeze='layer1': allowed: a table, such as [freeze] with part = …"),
        ({"adalase": {"kinds": "mixup"}}, "adalase.kinds='mixup': allowed: a list"),
        ({"augment": {"layer": ["a"]}}, "augment.layer=['a']: allowed: a text; several names in one, with commas"),
        ({"nesterov": True, "momentum": 0}, "nesterov=true needs momentum above 0"),
    ],
)  # fmt: skip
def test_a_run_is_still_told_what_was_wrong_in_the_old_words(settings: dict[str, Any], line: str):
    with pytest.raises(ConfigError) as caught:
        make_config(settings)
    assert str(caught.value) == line


def test_overlay_lays_tables_over_tables_and_changes_neither():
    below: dict[str, Any] = {"epochs": 5, "augment": {"layer": "a", "rate": 0.1}, "views": {"scale": 0.2}}
    above: dict[str, Any] = {"augment": {"rate": 0.2}, "views": None, "freeze": {"part": "after"}}
    assert overlay(below, above) == {
        "epochs": 5, "augment": {"layer": "a", "rate": 0.2}, "views": None, "freeze": {"part": "after"},
    }  # fmt: skip
    assert (below["augment"], above["augment"]) == ({"layer": "a", "rate": 0.1}, {"rate": 0.2})
    assert overlay({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}
    assert overlay(below, {}) == below
