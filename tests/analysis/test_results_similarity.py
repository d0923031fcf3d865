"""The result types of two models, nulls, influence, tests and film strips: JSON and back, and what they refuse."""

import json
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from layerlens.analysis.results import (
    SCHEMA,
    Caution,
    CrossSimilarity,
    Difference,
    FilmStrip,
    PermutationNull,
    SampleInfluence,
    SimilarityMatrix,
)
from layerlens.errors import DataError, ShapeError, UnknownLayerError

NAN = float("nan")
VALUES = np.array([[0.9, 0.25, NAN], [0.1, 0.75, NAN]])


def null(shape=(2, 3)):
    return PermutationNull(
        permutations=19, mean=np.full(shape, 0.01), bound=np.full(shape, 0.125), level=0.9,
        p_value=np.where(np.indices(shape)[1] < 2, 0.05, NAN),
    )  # fmt: skip


def cross(**changes):
    """Two layers against three, the third of which is constant."""
    given = {
        "first": ("stem", "head"), "second": ("a", "b", "dead"), "labels": ("old", "new"), "values": VALUES,
        "low": VALUES - 0.1, "high": VALUES + 0.05, "level": 0.9, "options": {"kernel": "rbf"}, "samples": 20,
        "sample_id": "feed", "null": null(), "weights": [4.0, 6.0], "replicates": np.stack([VALUES, VALUES + 0.01]),
        "cautions": (Caution(code="LL006", text="dead", layers=("new:dead",)),),
    }  # fmt: skip
    return CrossSimilarity(**{**given, **changes})


def square(shift=0.0, **changes):
    """Two layers of one model whose similarity is .5 and a shift; without replicates, null and precision."""
    values = np.array([[1.0, 0.5 + shift], [0.5 + shift, 1.0]])
    given = {
        "layers": ("a", "b"), "values": values, "low": values - 0.1, "high": values, "samples": 9,
        "participation": [2.0, NAN], "weights": [],
    }  # fmt: skip
    return SimilarityMatrix(**{**given, **changes})


def change(values=((NAN, 0.25), (0.25, NAN))):
    values = np.array(values)
    return Difference(
        rows=("a", "b"), columns=("a", "b"), values=values, low=values - 0.1, high=values + 0.1, p_value=values,
        adjusted=2 * values, paired=True, level=0.9,
    )  # fmt: skip


INFLUENCE = SampleInfluence(
    layers=("a", "b"), samples=4, largest=[0.1, 0.5, NAN, 0.2], z_score=[1.0, 12.0, NAN, 9.0],
    index=[[[1, 3], [1, 0]], [[1, 0], [3, 1]]], change=[[[0.0, 0.0], [0.5, -0.1]], [[0.5, -0.1], [0.0, NAN]]],
)  # fmt: skip
STRIP = FilmStrip(
    labels=("epoch 0", "epoch 4"),
    frames=(square(null=null((2, 2))), square(0.25, replicates=np.ones((2, 2, 2)), weights=[1.0, 2.0])),
    changes=(change(),),
)
RESULTS = {
    "null": null(), "cross": cross(), "cross without extras": cross(null=None, replicates=[], weights=[], cautions=()),
    "influence": INFLUENCE, "difference": change(), "strip": STRIP,
    "strip without changes": FilmStrip(labels=("epoch 0",), frames=(square(),), changes=()),
}  # fmt: skip


def assert_same(found, wanted):
    """Equal in type and content, results within results included; NaN equals NaN."""
    assert type(found) is type(wanted)
    if hasattr(wanted, "__dataclass_fields__"):
        for name in wanted.__dataclass_fields__:
            assert_same(getattr(found, name), getattr(wanted, name))
    elif isinstance(wanted, tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, np.ndarray):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_equal(found, wanted)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_comes_back_from_json_with_all_that_is_in_it(name):
    result = RESULTS[name]
    assert_same(type(result).from_json(result.to_json()), result)


@pytest.mark.parametrize("name", RESULTS)
def test_json_is_strict_and_carries_type_and_schema(name):
    content = json.loads(RESULTS[name].to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (content["type"], content["schema"]) == (type(RESULTS[name]).__name__, SCHEMA)


def test_nan_and_none_travel_as_null():
    content = json.loads(cross(null=None).to_json())
    assert content["values"] == [[0.9, 0.25, None], [0.1, 0.75, None]]
    assert content["precision_error"] is None
    assert content["null"] is None
    back = CrossSimilarity.from_dict(content)
    assert np.isnan(back.precision_error)
    assert back.null is None


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_frozen(name):
    for field in fields(RESULTS[name]):
        with pytest.raises(FrozenInstanceError):
            setattr(RESULTS[name], field.name, None)


@pytest.mark.parametrize(
    ("result", "name"),
    [
        *((null(), name) for name in ("mean", "bound", "p_value")),
        *((cross(), name) for name in ("values", "low", "high", "weights", "replicates")),
        *((INFLUENCE, name) for name in ("largest", "z_score", "change")),
        *((change(), name) for name in ("values", "low", "high", "p_value", "adjusted")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_arrays_are_read_only(result, name):
    with pytest.raises(ValueError, match="read-only"):
        getattr(result, name)[...] = 0.0


def test_arrays_are_copies_of_what_was_given():
    given = VALUES.copy()
    made = cross(values=given)
    given[0, 1] = 9.0
    assert made.between("stem", "b") == 0.25


@pytest.mark.parametrize("name", ["values", "low", "high", "replicates"])
def test_a_shape_that_does_not_fit_the_rectangle_is_named(name):
    wrong = np.ones((2, 3, 2)) if name == "replicates" else np.ones((3, 2))
    with pytest.raises(ShapeError, match=rf"{name} has shape .*; 2 × 3 layers need"):
        cross(**{name: wrong})


def test_weights_that_do_not_fit_the_replicates_of_a_matrix_are_refused():
    with pytest.raises(ShapeError, match=r"weights has shape \(3,\); 2 groups need \(2,\)"):
        square(replicates=np.ones((2, 2, 2)), weights=[1.0, 1.0, 1.0])


DAMAGE = {
    "rectangle of another shape": (cross(), "values", [[1.0, 2.0]]),
    "layers that are no list": (cross(), "first", 7),
    "null without its arrays": (cross(), "null", {"permutations": 3}),
    "caution without a code": (cross(), "cautions", [{"text": "no code"}]),
    "text for numbers": (INFLUENCE, "largest", "text"),
    "ragged rows": (change(), "values", [[1.0], [2.0, 3.0]]),
    "frame without values": (STRIP, "frames", [{"layers": ["a"]}]),
    "change without values": (STRIP, "changes", [{"rows": ["a"]}]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_json_is_one_clear_error(case):
    result, key, value = DAMAGE[case]
    with pytest.raises(DataError, match=f"this {type(result).__name__} is damaged"):
        type(result).from_dict({**result.to_dict(), key: value})


def test_the_json_of_a_matrix_of_one_model_is_no_rectangle():
    with pytest.raises(DataError, match="holds 'SimilarityMatrix', not a CrossSimilarity"):
        CrossSimilarity.from_json(square().to_json())


def test_between_and_place_take_the_row_first():
    found = cross()
    assert (found.place("head", "a"), found.between("head", "a")) == ((1, 0), 0.1)
    assert (found.place("stem", "b"), found.between("stem", "b")) == ((0, 1), 0.25)
    assert np.isnan(found.between("stem", "dead"))


@pytest.mark.parametrize("method", ["between", "place"])
@pytest.mark.parametrize(
    ("pair", "message"), [(("stam", "a"), "'stam'.*closest: stem"), (("stem", "deed"), "'deed'.*closest: dead")]
)
def test_an_unknown_layer_is_refused_with_the_closest(method, pair, message):
    with pytest.raises(UnknownLayerError, match=message):
        getattr(cross(), method)(*pair)


def test_a_layer_of_the_other_model_is_no_row():
    with pytest.raises(UnknownLayerError, match="no layer 'a' in this matrix"):
        cross().between("a", "stem")


def test_counterparts_are_the_most_alike_layers_of_the_second_model():
    assert cross().counterparts() == {"stem": "a", "head": "b"}


def test_counterparts_by_a_distance_are_the_nearest():
    assert cross(measure="procrustes").counterparts() == {"stem": "b", "head": "a"}


def test_a_layer_without_any_similarity_has_no_counterpart():
    assert cross(values=np.array([[NAN] * 3, [NAN, 0.1, 0.2]])).counterparts() == {"head": "dead"}


def test_missing_names_the_model_of_each_constant_layer():
    assert cross().missing == ("new:dead",)
    assert cross(values=np.array([[NAN] * 3, [0.3, 0.1, 0.2]])).missing == ("old:stem",)
    assert cross(values=np.ones((2, 3))).missing == ()


def test_leave_out_hands_back_the_replicates():
    np.testing.assert_array_equal(cross().leave_out()[1], VALUES + 0.01)
    assert cross(replicates=[]).leave_out().shape == (0, 2, 3)


def test_outliers_stand_out_by_more_than_the_threshold_strongest_first():
    assert INFLUENCE.outliers() == (1, 3)
    assert INFLUENCE.outliers(9.0) == (1,)
    assert INFLUENCE.outliers(0.5) == (1, 3, 0)
    assert INFLUENCE.outliers(100) == ()


def test_a_rectangle_leaves_as_one_row_per_pair_with_its_null():
    frame = cross().to_frame()
    expected = ["layer_a", "layer_b", "value", "low", "high", "measure", "null_bound", "p_value"]
    assert list(frame.columns) == expected
    assert list(zip(frame.layer_a, frame.layer_b, strict=True)) == [
        (one, two) for one in ("stem", "head") for two in ("a", "b", "dead")
    ]
    np.testing.assert_array_equal(frame.value, VALUES.ravel())
    assert set(frame.null_bound) == {0.125}
    np.testing.assert_array_equal(frame.p_value, [0.05, 0.05, NAN] * 2)
    assert list(cross(null=None).to_frame().columns) == expected[:-2]


def test_an_influence_leaves_as_one_row_per_sample():
    frame = INFLUENCE.to_frame()
    assert list(frame.columns) == ["sample", "largest", "z_score"]
    assert list(frame["sample"]) == [0, 1, 2, 3]
    assert (frame.largest[1], frame.z_score[1]) == (0.5, 12.0)


def test_a_difference_leaves_as_one_row_per_entry():
    frame = change().to_frame()
    assert list(frame.columns) == ["layer_a", "layer_b", "values", "low", "high", "p_value", "adjusted"]
    row = frame[(frame.layer_a == "a") & (frame.layer_b == "b")].iloc[0]
    assert (row["values"], row.adjusted) == (0.25, 0.5)


def test_a_film_strip_leaves_as_all_matrices_with_their_checkpoints():
    frame = STRIP.to_frame()
    assert set(frame.columns) == {
        "layer_a", "layer_b", "value", "low", "high", "measure", "checkpoint", "null_bound", "p_value",
    }  # fmt: skip
    assert list(frame.checkpoint) == ["epoch 0"] * 4 + ["epoch 4"] * 4
    assert list(frame.value) == [1.0, 0.5, 0.5, 1.0, 1.0, 0.75, 0.75, 1.0]
