"""The frozen results: their way into JSON and frames and back, and what they refuse."""

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from layerlens.analysis.results import SCHEMA, Caution, Geometry, LayerProfile, SimilarityMatrix
from layerlens.errors import DataError, ShapeError


def matrix(**changes):
    values = np.array([[1.0, 0.25, np.nan], [0.25, 1.0, np.nan], [np.nan, np.nan, np.nan]])
    given = {
        "layers": ("a", "b", "dead"), "values": values, "low": values - 0.1, "high": values + 0.1, "level": 0.9,
        "options": {"kernel": "rbf", "estimator": "debiased"}, "samples": 20,
        "participation": np.array([2.0, 3.0, np.nan]),
        "blocks": np.ones((2, 3, 3)), "weights": np.array([10.0, 10.0]),
    }  # fmt: skip
    return SimilarityMatrix(**{**given, **changes})


GEOMETRY = Geometry(alignment=0.5, uniformity=-2.25, samples=30, split="test", epoch=4)
PROFILE = LayerProfile(
    measure="effective_rank", layers=("a", "dead"), values=(3.5, float("nan")), low=(3.0, float("nan")),
    high=(4.0, float("nan")), ceiling=9.0, samples=30,
)  # fmt: skip
RESULTS = {"matrix": matrix(), "geometry": GEOMETRY, "profile": PROFILE}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_comes_back_from_json_field_by_field(name):
    result = RESULTS[name]
    back = type(result).from_json(result.to_json())
    assert vars(back).keys() == vars(result).keys()
    for key, value in vars(result).items():
        assert type(vars(back)[key]) is type(value), key
        np.testing.assert_equal(vars(back)[key], value)


@pytest.mark.parametrize("name", RESULTS)
def test_json_carries_type_and_schema_and_null_for_nan(name):
    text = RESULTS[name].to_json()
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["type"] == type(RESULTS[name]).__name__
    assert content["schema"] == SCHEMA == 1
    if name == "matrix":
        assert content["values"][2] == [None, None, None]
        assert content["participation"] == [2.0, 3.0, None]
    if name == "profile":
        assert content["values"] == [3.5, None]


def test_json_options_reach_the_writer():
    assert GEOMETRY.to_json(indent=1).startswith('{\n "type": "Geometry"')


def test_another_type_is_refused():
    with pytest.raises(DataError, match="holds 'Geometry', not a SimilarityMatrix"):
        SimilarityMatrix.from_json(GEOMETRY.to_json())
    with pytest.raises(DataError, match="holds 'list', not a Geometry"):
        Geometry.from_json("[1, 2]")
    with pytest.raises(DataError, match="holds None, not a Geometry"):
        Geometry.from_json("{}")


def test_a_newer_schema_is_refused():
    with pytest.raises(DataError, match=r"schema 2; this layerlens reads 1: update"):
        Geometry.from_dict({**GEOMETRY.to_dict(), "schema": 2})


def test_a_missing_field_is_named():
    content = GEOMETRY.to_dict()
    del content["samples"]
    with pytest.raises(DataError, match=r"this Geometry is damaged.*samples"):
        Geometry.from_dict(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [("values", [[1.0, 2.0]]), ("values", "text"), ("weights", 3), ("layers", 7), ("blocks", [[[1.0], [2.0, 3.0]]])],
)
def test_a_damaged_matrix_is_refused(key, value):
    with pytest.raises(DataError, match="this SimilarityMatrix is damaged"):
        SimilarityMatrix.from_dict({**matrix().to_dict(), key: value})


def test_a_damaged_profile_is_refused():
    with pytest.raises(DataError, match="values has 1 numbers for 2 layers"):
        LayerProfile.from_dict({**PROFILE.to_dict(), "values": [1.0]})


@pytest.mark.parametrize("text", ["", "{", "NaN", "not json"])
def test_text_that_is_no_result_is_refused(text):
    with pytest.raises(DataError, match=r"not JSON|not a Geometry"):
        Geometry.from_json(text)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_frozen(name):
    with pytest.raises(FrozenInstanceError):
        RESULTS[name].samples = 3


def test_the_arrays_of_a_matrix_are_read_only_copies():
    values = np.eye(3)
    made = matrix(values=values)
    values[0, 1] = 9.0
    assert made.between("a", "b") == 0
    with pytest.raises(ValueError, match="read-only"):
        made.values[0, 1] = 9.0


@pytest.mark.parametrize("name", ["values", "low", "high", "participation", "blocks", "weights"])
def test_a_shape_that_does_not_fit_the_layers_is_named(name):
    with pytest.raises(ShapeError, match=f"{name} has shape"):
        matrix(**{name: np.ones((5, 5))})


def test_results_take_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        Caution("LL001", "text")


def test_between_finds_layers_by_name_and_missing_lists_the_constant_ones():
    assert matrix().between("a", "b") == 0.25
    assert matrix().missing == ("dead",)


def test_a_matrix_leaves_as_one_row_per_pair():
    frame = matrix().to_frame()
    assert list(frame.columns) == ["layer_a", "layer_b", "value", "low", "high", "measure"]
    assert len(frame) == 9
    row = frame[(frame.layer_a == "a") & (frame.layer_b == "b")].iloc[0]
    assert (row.value, row.low, row.high, row.measure) == (0.25, pytest.approx(0.15), pytest.approx(0.35), "cka")
    assert list(frame.layer_a[:3]) == ["a", "a", "a"]


def test_a_profile_leaves_as_one_row_per_layer():
    frame = PROFILE.to_frame()
    assert set(frame.columns) == {"layer", "measure", "value", "low", "high"}
    assert list(frame.layer) == ["a", "dead"]
    assert frame.value[0] == 3.5
    assert np.isnan(frame.value[1])


def test_a_geometry_leaves_as_one_row():
    frame = GEOMETRY.to_frame()
    assert frame.to_dict("records") == [
        {"alignment": 0.5, "uniformity": -2.25, "samples": 30, "split": "test", "epoch": 4}
    ]
