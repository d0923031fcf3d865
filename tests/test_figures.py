"""Figures by what they show: ticks, limits, numbers, frames and marks; never pixels."""

import json

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from layerlens import figures
from layerlens.analysis.regions import Estimate, Region, RegionSet
from layerlens.analysis.results import Geometry, LayerProfile, SimilarityMatrix
from layerlens.errors import RunFolderError, ShapeError
from layerlens.recommendation import Target

LAYERS = ("stem", "one", "two", "three")


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


def matrix(layers=LAYERS, **changes):
    count = len(layers)
    values = np.random.default_rng(count).uniform(0.1, 0.95, (count, count))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1.0)
    values = changes.pop("values", values)
    given = {"low": values, "high": values, "samples": 100, "participation": np.ones(count)}
    given |= {"blocks": np.ones((2, count, count)), "weights": np.array([50.0, 50.0])}
    return SimilarityMatrix(layers=layers, values=values, **given, **changes)


def region(layers, distinct=True):
    return Region(
        layers=layers, within=0.9, outside=0.2, contrast=Estimate(value=0.7, low=0.6, high=0.8), twin=None, gain=None,
        start_confidence=1.0, end_confidence=1.0, distinct=distinct, trained=None,
    )  # fmt: skip


def region_set(*regions, layers=LAYERS):
    runs = tuple(r.layers for r in regions)
    return RegionSet(layers=layers, runs=runs, regions=regions, criterion="two-level", resamples=1, cautions=())


def target(layer, stop, layers=LAYERS):
    return Target(
        rank=1, layer=layer, index=layers.index(layer), stop_gradient=stop, reason="", confidence=1.0, evidence={}
    )


def frames(axes):
    return [p for p in axes.patches if isinstance(p, Rectangle)]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_heatmap_shows_the_matrix_in_layer_order_on_a_scale_from_zero_to_one():
    result = matrix()
    axes = figures.heatmap(result)
    (image,) = axes.images
    np.testing.assert_array_equal(np.asarray(image.get_array()), result.values)
    assert image.get_clim() == (0, 1)
    assert image.origin == "lower"
    for axis in (axes.xaxis, axes.yaxis):
        assert list(axis.get_ticklocs()) == [0, 1, 2, 3]
        assert [text.split() for text in labels(axis)] == [[name, str(i)] for i, name in enumerate(LAYERS)]
    assert axes.get_title() == "linear CKA, 100 samples"


def test_heatmap_writes_the_numbers_of_a_small_matrix_beside_the_diagonal():
    values = np.array([[1.0, 0.25, np.nan], [0.25, 1.0, -0.031], [np.nan, -0.031, 1.0]])
    axes = figures.heatmap(matrix(("a", "b", "c"), values=values))
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 1): ".25", (1, 0): ".25", (1, 2): "-.03", (2, 1): "-.03"}
    assert np.ma.getmaskarray(axes.images[0].get_array())[0, 2]
    assert not figures.heatmap(matrix(tuple(f"l{i}" for i in range(13)))).texts


def test_heatmap_keeps_values_below_zero_and_a_title_of_ones_own():
    axes = figures.heatmap(matrix(("a", "b"), values=np.array([[1.0, -0.1], [-0.1, 1.0]])), title="mine")
    assert axes.images[0].get_array()[0, 1] == -0.1
    assert axes.get_title() == "mine"


def test_heatmap_draws_on_given_axes_with_or_without_a_colour_bar():
    figure, axes = plt.subplots()
    assert figures.heatmap(matrix(), ax=axes, colorbar=False) is axes
    assert len(figure.axes) == 1
    figures.heatmap(matrix(), ax=axes)
    assert len(figure.axes) == 2


def test_heatmap_frames_each_region_solid_if_supported_and_dotted_if_not():
    found = region_set(region(("stem", "one")), region(("two", "three"), distinct=False))
    first, second = frames(figures.heatmap(matrix(), regions=found))
    assert (first.get_xy(), first.get_width(), first.get_height()) == ((-0.5, -0.5), 2, 2)
    assert (second.get_xy(), second.get_width(), second.get_height()) == ((1.5, 1.5), 2, 2)
    assert first.get_linestyle() in ("-", "solid")
    assert second.get_linestyle() in (":", "dotted")


def test_heatmap_frames_reach_over_a_dead_layer_inside_a_region():
    frame = frames(figures.heatmap(matrix(), regions=region_set(region(("stem", "two", "three")))))[0]
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((-0.5, -0.5), 4, 4)


def test_heatmap_marks_targets_on_the_diagonal_and_at_their_labels():
    axes = figures.heatmap(matrix(), targets=[target("one", True), target("three", False)])
    marks = [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in axes.lines]
    assert marks == [(1, 1, ">"), (3, 3, "<")]
    for axis in (axes.xaxis, axes.yaxis):
        colours = [to_hex(label.get_color()) for label in axis.get_ticklabels()]
        assert colours[1] == colours[3] != colours[0]
        assert colours[0] == colours[2]


def test_heatmaps_share_one_scale_and_one_colour_bar():
    results = {"before": matrix(), "after": matrix(("a", "b", "c"))}
    found = region_set(region(("b", "c")), layers=("a", "b", "c"))
    mark = [target("b", True, ("a", "b", "c"))]
    figure = figures.heatmaps(results, regions={"after": found}, targets={"after": mark})
    left, right, _bar = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["before", "after"]
    assert [axes.images[0].get_clim() for axes in (left, right)] == [(0, 1), (0, 1)]
    for axes, result in zip((left, right), results.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), result.values)
    assert (len(frames(left)), len(frames(right))) == (0, 1)
    assert (len(left.lines), len(right.lines)) == (0, 1)


def test_heatmaps_of_nothing_are_refused():
    with pytest.raises(ShapeError, match="no matrix to draw"):
        figures.heatmaps({})


def geometry(epoch, alignment, uniformity):
    return Geometry(alignment=alignment, uniformity=uniformity, samples=10, split="test", epoch=epoch)


def test_geometry_plane_shows_uniformity_against_alignment_with_an_arrow_per_step():
    run = [geometry(0, 0.1, -0.5), geometry(5, 0.3, -2.0), geometry(10, 0.4, -2.5)]
    axes = figures.geometry_plane({"a": run, "b": [geometry(None, 0.2, -1.0)]})
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[-0.5, 0.1], [-2.0, 0.3], [-2.5, 0.4]])
    np.testing.assert_array_equal(second.get_xydata(), [[-1.0, 0.2]])
    arrows = [(text.xy, text.xyann) for text in axes.texts if text.arrow_patch is not None]
    assert arrows == [((-2.0, 0.3), (-0.5, 0.1)), ((-2.5, 0.4), (-2.0, 0.3))]
    assert sorted(text.get_text() for text in axes.texts if text.get_text()) == ["epoch 0", "epoch 10"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert axes.get_xlabel().startswith("uniformity")
    assert axes.get_ylabel().startswith("alignment")
    assert first.get_color() != second.get_color()


def profile(values, layers=LAYERS):
    low, high = (tuple(v + d for v in values) for d in (-0.5, 0.5))
    return LayerProfile(
        measure="effective_rank", layers=layers, values=values, low=low, high=high, ceiling=99.0, samples=10
    )


def test_layer_profile_shows_the_numbers_and_their_intervals_in_layer_order():
    axes = figures.layer_profile({"before": profile((1.0, 2.0, 3.0, 4.0)), "after": profile((4.0, 5.0, 6.0, 7.0))})
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [4, 5, 6, 7])
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 1, 2, 3])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.5, 4.5)
    assert labels(axes.xaxis) == list(LAYERS)
    assert axes.get_ylabel() == "effective rank"
    assert axes.get_ylim()[0] == 0


def test_layer_profile_refuses_other_layers_and_none():
    with pytest.raises(ShapeError, match="same layers"):
        figures.layer_profile({"a": profile((1.0,), ("x",)), "b": profile((1.0,), ("y",))})
    with pytest.raises(ShapeError, match="at least one"):
        figures.layer_profile({})


def test_training_curves_leave_out_epochs_without_the_number():
    lines = [{"epoch": 0, "loss": 3.0}, {"epoch": 1, "loss": 2.0, "knn": 0.5}, {"epoch": 2, "loss": 1.0, "knn": None}]
    axes = figures.training_curves({"run": lines, "empty": []}, key="knn")
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 0.5]])
    assert len(axes.lines[1].get_xydata()) == 0
    assert axes.get_ylabel() == "k-NN accuracy, held-out"
    axes = figures.training_curves({"run": lines})
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 3], [1, 2], [2, 1]])
    assert axes.get_ylabel() == "training loss (nats)"


def test_save_figure_writes_every_format_and_the_numbers_and_closes_the_figure(tmp_path):
    result = matrix()
    axes = figures.heatmap(result)
    written = figures.save_figure(axes, tmp_path / "new" / "similarity.v1", result)
    assert [p.name for p in written] == [f"similarity.v1.{ending}" for ending in ("png", "svg", "pdf", "json")]
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    starts = [p.read_bytes()[:4] for p in written[:3]]
    assert starts == [b"\x89PNG", b"<?xm", b"%PDF"]
    assert SimilarityMatrix.from_json(written[3].read_text()).to_dict() == result.to_dict()
    assert not plt.get_fignums()


def test_save_figure_writes_results_by_label_and_only_the_asked_formats(tmp_path):
    source = {"a": [geometry(0, 0.1, -0.5)], "b": matrix()}
    written = figures.save_figure(figures.geometry_plane({"a": source["a"]}), tmp_path / "plane", source, ["svg"])
    assert [p.name for p in written] == ["plane.svg", "plane.json"]
    assert json.loads(written[1].read_text()) == {"a": [source["a"][0].to_dict()], "b": source["b"].to_dict()}


DRAWINGS = {
    "heatmap": lambda: figures.heatmap(
        matrix(), regions=region_set(region(("stem", "one"))), targets=[target("one", True)]
    ),
    "heatmaps": lambda: figures.heatmaps({"a": matrix(), "b": matrix()}),
    "geometry_plane": lambda: figures.geometry_plane({"a": [geometry(0, 0.1, -0.5), geometry(1, 0.2, -0.6)]}),
    "layer_profile": lambda: figures.layer_profile({"a": profile((1.0, 2.0, 3.0, 4.0))}),
    "training_curves": lambda: figures.training_curves({"a": [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5}]}),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_drawn_twice_has_the_same_bytes(name, tmp_path):
    first, again = (figures.save_figure(DRAWINGS[name](), tmp_path / run / "f", {}) for run in ("one", "two"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_and_saving_leave_the_global_style_as_it_was(name, tmp_path):
    before = dict(mpl.rcParams)
    figures.save_figure(DRAWINGS[name](), tmp_path / "f", {})
    assert dict(mpl.rcParams) == before


def test_a_folder_that_cannot_be_made_is_one_clear_error_and_the_figure_is_closed(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunFolderError, match=r"can't write .*taken/similarity.*--out"):
        figures.save_figure(figures.heatmap(matrix()), tmp_path / "taken" / "similarity", matrix())
    assert not plt.get_fignums()
