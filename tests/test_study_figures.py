"""Figures of studies by what they show: means, intervals, order, labels, bands; never pixels."""

import math

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from layerlens import study_figures as figures
from layerlens.analysis.results import SimilarityMatrix
from layerlens.errors import DataError, LayerlensError, ShapeError, UnknownNameError
from layerlens.experiments.results import StudyResult
from layerlens.experiments.study import Drawing

T2 = 4.302652729749  # 97.5 % of Student's t with 2 degrees of freedom
HALF = T2 * 0.1 / math.sqrt(3)  # half of the interval of m - 0.1, m, m + 0.1
LAYERS = ("layer1", "layer2", "layer3")
BLACK = "#000000"


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


def setting(arm, mean, baseline=False, start=None, **values):
    return {"arm": arm, "mean": mean, "baseline": baseline, "start": start, "values": values}


def rows(score):
    """Checkpoints at epochs 0, 5 and 10, with the probe rising to the score."""
    return [
        {
            "epoch": epoch, "probe": score - 0.2 + 0.02 * epoch, "top1": 0.5, "alignment_test": 0.1 + 0.01 * epoch,
            "uniformity_test": -1 - score - 0.1 * epoch, "alignment_train": 0.1, "uniformity_train": -2.0 - 0.1 * epoch,
        }
        for epoch in (0, 5, 10)
    ]  # fmt: skip


def study(*settings, seeds=3, data=("",), similarity=(), **says):
    """Each setting's seeds score its mean - 0.1, the mean, and the mean + 0.1."""
    runs = [
        {
            "key": f"{s['arm']}{s['values']}{seed}", "arm": s["arm"], "baseline": s["baseline"], "start": s["start"],
            "values": s["values"], "seed": seed, "data": "digits", "wall_s": 1.0, "advice": [], "environment": {},
            "scores": {d: rows(s["mean"] + 0.1 * (seed - 1) - 0.05 * k) for k, d in enumerate(data)},
        }
        for s in settings
        for seed in (range(seeds) if seeds > 1 else [1])
    ]  # fmt: skip
    return StudyResult(
        name="made",
        study={"starts": {}, **says},
        runs=tuple(runs),
        similarity=tuple(similarity),
        failed={},
        missing=0,
        environment={},
    )


SWEEP = [
    setting("plain", 0.6, baseline=True),
    *(
        setting("deep", 0.5 + 0.1 * k + 0.05 * stop, layer=layer, stop_gradient=stop)
        for k, layer in enumerate(LAYERS)
        for stop in (False, True)
    ),
]


def lines(axes):
    """Label -> what was drawn with error bars."""
    return {bars.get_label(): bars for bars in axes.containers}


def bars(axes, label):
    """Means, and lower and upper ends, of one line."""
    line, _, (sticks,) = lines(axes)[label]
    ends = np.array(sticks.get_segments())[:, :, 1]
    return line.get_ydata(), ends[:, 0], ends[:, 1]


def across(axes, label):
    """Where along x the points of one line stand."""
    return lines(axes)[label][0].get_xydata()[:, 0]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def horizontal(axes):
    """Label -> height of the lines across."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): line.get_ydata()[0] for line in named if list(line.get_xdata()) == [0, 1]}


def bands(axes):
    return [(p.get_y(), p.get_y() + p.get_height()) for p in axes.patches if isinstance(p, Rectangle)]


def test_sweep_shows_the_means_with_students_intervals_at_the_layers_of_the_study():
    axes = figures.sweep(study(*SWEEP))
    for label, means in (("no stop", [0.5, 0.6, 0.7]), ("stop", [0.55, 0.65, 0.75])):
        drawn, low, high = bars(axes, label)
        np.testing.assert_allclose(drawn, means)
        np.testing.assert_allclose(low, np.array(means) - HALF)
        np.testing.assert_allclose(high, np.array(means) + HALF)
        np.testing.assert_allclose(across(axes, label), [0, 1, 2], atol=0.2)
    assert ticks(axes.xaxis) == list(LAYERS)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "logistic regression, test accuracy")
    assert legend(axes) == ["plain", "no stop", "stop"]


def test_sweep_sets_intervals_side_by_side():
    axes = figures.sweep(study(*SWEEP))
    first, second = (across(axes, label) for label in ("no stop", "stop"))
    assert np.all(second - first > 0.05)
    np.testing.assert_allclose((first + second) / 2, [0, 1, 2])


def test_sweep_has_one_colour_for_stop_and_no_stop_and_tells_them_apart_by_line_and_mark():
    axes = figures.sweep(study(*SWEEP))
    stop, no_stop = (lines(axes)[label][0] for label in ("stop", "no stop"))
    assert stop.get_color() == no_stop.get_color()
    assert (stop.get_linestyle(), no_stop.get_linestyle()) == ("-", "--")
    assert to_hex(no_stop.get_markerfacecolor()) == "#ffffff" != to_hex(stop.get_markerfacecolor())


def test_sweep_draws_the_baseline_as_a_black_line_with_its_interval_as_a_band():
    axes = figures.sweep(study(*SWEEP))
    assert horizontal(axes) == {"plain": pytest.approx(0.6)}
    assert bands(axes) == [(pytest.approx(0.6 - HALF), pytest.approx(0.6 + HALF))]
    (line,) = (line for line in axes.lines if line.get_label() == "plain")
    assert (to_hex(line.get_color()), line.get_linestyle()) == (BLACK, "--")


def test_sweep_draws_other_settings_without_the_axis_across_in_colour():
    result = study(*SWEEP, setting("adaptive", 0.8))
    axes = figures.sweep(result)
    assert horizontal(axes) == {"plain": pytest.approx(0.6), "adaptive": pytest.approx(0.8)}
    assert bands(axes)[1] == (pytest.approx(0.8 - HALF), pytest.approx(0.8 + HALF))
    drawn = [line for line in axes.lines if line.get_label() in ("plain", "adaptive")]
    assert len({to_hex(line.get_color()) for line in drawn}) == len({line.get_marker() for line in drawn}) == 2
    assert legend(axes) == ["plain", "adaptive", "deep, no stop", "deep, stop"]


def test_a_single_seed_has_points_without_intervals():
    axes = figures.sweep(study(*SWEEP, seeds=1))
    line, caps, sticks = lines(axes)["stop"]
    np.testing.assert_allclose(line.get_ydata(), [0.55, 0.65, 0.75])
    assert (caps, sticks) == ((), ())
    assert bands(axes) == []
    assert figures.over_epochs(study(*SWEEP, seeds=1)).lines
    grid = figures.grid(study(*SWEEP, seeds=1), x="layer", rows="stop_gradient")
    assert [text.get_text() for text in grid.texts][:2] == ["0.500", "0.550"]


def test_an_axis_of_accuracy_ends_where_accuracy_does():
    result = study(*SWEEP, seeds=2)  # intervals of two seeds reach beyond [0, 1]
    assert figures.sweep(result).get_ylim() == (-0.02, 1.02)
    axes = figures.sweep(result, metric="uniformity_test")
    assert axes.get_ylim()[0] < -3
    assert axes.get_ylabel() == "uniformity, test (lower is better)"


@pytest.mark.parametrize(("named", "expected"), [((), "stop"), (("arm", "stop_gradient"), "deep, stop")])
def test_labels_name_the_arm_when_asked_to(named, expected):
    assert expected in legend(figures.sweep(study(*SWEEP), lines=named))


def test_labels_name_the_arm_when_several_are_compared():
    other = [setting("late", 0.7, layer=layer, stop_gradient=True) for layer in LAYERS]
    assert legend(figures.sweep(study(*SWEEP, *other))) == ["plain", "deep, no stop", "deep, stop", "late, stop"]


def test_layers_that_one_line_lacks_stand_at_their_place():
    result = study(
        *(setting("some", 0.5, layer=layer) for layer in ("layer1", "layer3")),
        *(setting("all", 0.6, layer=layer) for layer in LAYERS),
    )
    axes = figures.sweep(result)
    assert ticks(axes.xaxis) == list(LAYERS)
    np.testing.assert_allclose(across(axes, "some"), [0, 2], atol=0.2)


def test_numbers_are_to_scale_in_order_of_size_and_logarithmic_over_a_wide_range():
    narrow = study(*(setting("deep", 0.5 + rate, rate=rate) for rate in (0.5, 0.25, 0.125)))
    axes = figures.sweep(narrow, x="rate")
    assert axes.get_xscale() == "linear"
    np.testing.assert_allclose(lines(axes)["deep"][0].get_xydata(), [[0.125, 0.625], [0.25, 0.75], [0.5, 1.0]])
    assert ticks(axes.xaxis) == ["0.125", "0.25", "0.5"]
    wide = study(*(setting("deep", 0.5, train_samples=n) for n in (100, 1000, 2001)))
    axes = figures.sweep(wide, x="train_samples")
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(across(axes, "deep"), [100, 1000, 2001])
    assert axes.get_xlabel() == "training samples"
    edge = study(*(setting("deep", 0.5, train_samples=n) for n in (100, 2000)))
    assert figures.sweep(edge, x="train_samples").get_xscale() == "linear"


def test_ticks_of_numbers_too_close_for_labels_are_left_out():
    result = study(*(setting("deep", 0.5, rate=rate) for rate in (0.0, 0.001, 0.1, 0.5)))
    assert ticks(figures.sweep(result, x="rate").xaxis) == ["0", "0.1", "0.5"]


def test_a_baseline_that_has_the_axis_is_a_black_line_with_intervals():
    result = study(
        *(setting("none", 0.4 + n / 1000, baseline=True, train_samples=n) for n in (100, 200)),
        *(setting("single", 0.5, train_samples=n, layer=layer) for n in (100, 200) for layer in LAYERS),
    )
    axes = figures.sweep(result, x="train_samples", lines=["arm", "layer"])
    np.testing.assert_allclose(bars(axes, "none")[0], [0.5, 0.6])
    assert to_hex(lines(axes)["none"][0].get_color()) == BLACK
    assert legend(axes) == ["none", *(f"single, {layer}" for layer in LAYERS)]
    assert legend(figures.sweep(result, lines=["train_samples"], arms=["single"])) == [
        "training samples 100", "training samples 200",
    ]  # fmt: skip


def test_arms_can_be_what_is_drawn_along():
    result = study(setting("plain", 0.6, baseline=True), setting("one", 0.7), setting("two", 0.8))
    axes = figures.sweep(result, x="arm")
    assert ticks(axes.xaxis) == ["one", "two"]
    (line, _, _), *rest = axes.containers
    assert not rest
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.7], [1, 0.8]])
    assert line.get_linestyle() == "None"
    assert horizontal(axes) == {"plain": pytest.approx(0.6)}


def test_a_legend_of_more_than_four_or_with_bands_stands_beside():
    few = figures.sweep(study(*SWEEP[1:]))
    banded = figures.sweep(study(*SWEEP))
    many = figures.sweep(study(*(setting(f"arm{k}", 0.5, layer=layer) for k in range(5) for layer in LAYERS)))
    for axes in (few, banded, many):
        axes.figure.canvas.draw()
    assert few.get_legend().get_window_extent().x1 <= few.bbox.x1
    for axes in (banded, many):
        assert axes.bbox.x1 <= axes.get_legend().get_window_extent().x0
        assert axes.get_legend().get_window_extent().x1 <= axes.figure.bbox.x1


def test_every_line_differs_in_colour_or_mark():
    result = study(*(setting("deep", 0.5, layer=f"block{k}") for k in range(48)))
    drawn = figures.over_epochs(result).lines
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in drawn}) == 48
    with pytest.raises(ShapeError, match="49 lines can't be told apart; allowed: 48"):
        figures.over_epochs(study(*(setting("deep", 0.5, layer=f"block{k}") for k in range(49))))


def test_runs_that_arms_start_from_are_drawn_only_when_named():
    result = study(*SWEEP, setting("pretrained", 0.9), starts={"pretrained": {}})
    assert "pretrained" not in horizontal(figures.sweep(result))
    assert "pretrained" in horizontal(figures.sweep(result, arms=["deep", "pretrained"]))


def test_other_data_are_drawn_and_named():
    result = study(*SWEEP, data=("", "cifar10"))
    axes = figures.sweep(result, data="cifar10")
    np.testing.assert_allclose(bars(axes, "stop")[0], [0.5, 0.6, 0.7])
    assert axes.get_ylabel().split("\n") == ["logistic regression, test accuracy,", "on cifar10"]
    assert figures.sweep(result, data="cifar10", metric="top1").get_ylabel() == "classifier, test accuracy, on cifar10"


WRONG = {
    "metric": (UnknownNameError, "unknown metric 'prob'; closest: probe", {"metric": "prob"}),
    "axis": (UnknownNameError, "unknown axis 'layr'; closest: layer", {"x": "layr"}),
    "lines": (UnknownNameError, "unknown axis 'stop'; closest: stop_gradient", {"lines": ["stop"]}),
    "arm": (UnknownNameError, "unknown arm 'deeep'; closest: deep", {"arms": ["deeep"]}),
    "data": (UnknownNameError, "unknown data 'mnist'", {"data": "mnist"}),
    "together": (ShapeError, "'deep' that differ in stop_gradient would be one point", {"lines": ["arm"]}),
    "no axis": (DataError, "no finished run of 'made' that is drawn has the axis 'layer'", {"arms": ["plain"]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_sweep_refuses(name):
    kind, message, options = WRONG[name]
    with pytest.raises(kind, match=message):
        figures.sweep(study(*SWEEP), **options)


def test_an_axis_of_the_study_without_finished_runs_is_known():
    result = study(SWEEP[0], arms=[{"name": "plain"}, {"name": "deep", "axes": {"augment.layer": "each layer"}}])
    with pytest.raises(DataError, match="no finished run of 'made' that is drawn has the axis 'layer'"):
        figures.sweep(result)
    with pytest.raises(DataError, match="no finished run of deep in 'made' has 'probe' on its own data"):
        figures.sweep(result, arms=["deep"])
    with pytest.raises(DataError, match="no run of 'made' has finished yet"):
        figures.over_epochs(study())


def test_over_epochs_shows_means_and_bands_of_each_setting():
    axes = figures.over_epochs(study(*SWEEP), lines=["arm", "layer", "stop_gradient"])
    expected = ["plain"] + [f"deep, {layer}, {stop}" for layer in LAYERS for stop in ("no stop", "stop")]
    assert legend(axes) == expected
    drawn = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(drawn["plain"].get_xydata(), [[0, 0.4], [5, 0.5], [10, 0.6]])
    np.testing.assert_allclose(drawn["deep, layer3, stop"].get_ydata(), [0.55, 0.65, 0.75])
    heights = axes.collections[0].get_paths()[0].vertices
    last = heights[heights[:, 0] == 10][:, 1]
    np.testing.assert_allclose((last.min(), last.max()), (0.6 - HALF, 0.6 + HALF))
    assert (to_hex(drawn["plain"].get_color()), drawn["plain"].get_linestyle()) == (BLACK, "--")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "logistic regression, test accuracy")


def test_over_epochs_draws_the_asked_arms_and_refuses_settings_without_labels():
    assert legend(figures.over_epochs(study(*SWEEP), arms=["plain"])) == ["plain"]
    with pytest.raises(ShapeError, match="differ in stop_gradient would be one point"):
        figures.over_epochs(study(*SWEEP), lines=["layer"])


def matrix(value, layers=LAYERS):
    values = np.full((len(layers), len(layers)), value)
    return SimilarityMatrix(
        layers=layers, values=values, low=values, high=values, samples=100, participation=np.ones(len(layers)),
        blocks=np.zeros((0, *values.shape)), weights=np.zeros(0),
    )  # fmt: skip


def kept(arm, first, last, start=None, seeds=3, **values):
    return {
        "arm": arm, "start": start, "values": values, "seeds": seeds, "first": matrix(first).to_dict(),
        "last": matrix(last).to_dict(),
    }  # fmt: skip


MAPS = [
    kept("pretrained", 0.05, 0.15),
    kept("plain", 0.1, 0.2),
    *(kept("deep", 0.1, 0.3 + 0.1 * stop, layer="layer1", stop_gradient=stop) for stop in (False, True)),
    kept("deep", 0.1, 0.5, layer="layer2", stop_gradient=True),
]


def shown(figure):
    """Title -> the one value of each map."""
    return {axes.get_title(): axes.images[0].get_array()[0, 1] for axes in figure.axes if axes.get_title()}


def test_similarity_shows_the_untrained_baseline_and_then_every_setting_on_one_scale():
    result = study(*SWEEP, similarity=MAPS, starts={"pretrained": {}})
    figure = figures.similarity(result, columns=3)
    found = shown(figure)
    assert found == {
        "untrained": 0.1, "plain": 0.2, "layer1, no stop": 0.3, "layer1, stop": 0.4, "layer2, stop": 0.5,
    }  # fmt: skip
    assert list(found)[:2] == ["untrained", "plain"]
    maps = [axes for axes in figure.axes if axes.images]
    assert {axes.images[0].get_clim() for axes in maps} == {(0, 1)}
    assert ticks(maps[0].yaxis) == ticks(maps[3].yaxis) == list(LAYERS)
    assert [ticks(maps[k].xaxis) == list(LAYERS) for k in range(5)] == [False, False, True, True, True]
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "CKA, mean of 3 seeds"
    assert not any(axes.patches for axes in maps)


def test_similarity_of_one_arm_begins_with_the_untrained_baseline_all_the_same():
    result = study(*SWEEP, similarity=MAPS, starts={"pretrained": {}})
    assert list(shown(figures.similarity(result, arms=["deep"]))) == [
        "untrained", "layer1, no stop", "layer1, stop", "layer2, stop",
    ]  # fmt: skip


def test_similarity_refuses_too_many_maps_none_and_no_columns():
    many = [kept("deep", 0.1, 0.2, layer=f"layer{k}") for k in range(21)]
    result = study(*SWEEP, similarity=many)
    with pytest.raises(ShapeError, match=r"21 heat maps; allowed: 20\. Name the arms to draw: plain, deep"):
        figures.similarity(result)
    with pytest.raises(DataError, match=r"no finished run of plain in 'made' has CKA; set measure\.cka"):
        figures.similarity(result, arms=["plain"])
    with pytest.raises(ShapeError, match="columns=0; allowed: 1 or more"):
        figures.similarity(result, columns=0)


def arrows(axes):
    return [(text.xyann, text.xy) for text in axes.texts if text.arrow_patch is not None]


def test_geometry_shows_the_means_over_seeds_with_an_arrow_between_epochs():
    result = study(SWEEP[0], setting("deep", 0.5))
    axes = figures.geometry(result, split="test")
    plain, deep = axes.lines
    np.testing.assert_allclose(plain.get_xydata(), [[-1.6, 0.1], [-2.1, 0.15], [-2.6, 0.2]])
    np.testing.assert_allclose(deep.get_xdata(), [-1.5, -2.0, -2.5])
    assert [len(p) for p in arrows(axes)] == [2] * 4
    np.testing.assert_allclose(arrows(axes)[0], [(-1.6, 0.1), (-2.1, 0.15)])
    assert legend(axes) == ["plain", "deep"]
    assert axes.get_legend().get_title().get_text() == "epochs 0, 5, 10"
    assert axes.get_xlabel() == "uniformity, test (lower is better)"
    assert axes.get_ylabel() == "alignment, test (lower is better)"
    assert to_hex(plain.get_color()) == BLACK != to_hex(deep.get_color())


def test_geometry_of_both_splits_tells_them_apart():
    result = study(SWEEP[0], setting("deep", 0.5))
    axes = figures.geometry(result)
    assert legend(axes) == ["plain", "deep", "test", "train"]
    test, _, train, _ = axes.lines
    np.testing.assert_allclose(train.get_xydata(), [[-2.0, 0.1], [-2.5, 0.1], [-3.0, 0.1]])
    assert test.get_markersize() > train.get_markersize()
    drawn = [text.arrow_patch.get_linestyle() for text in axes.texts]
    assert drawn == ["-"] * 4 + [":"] * 4
    with pytest.raises(UnknownNameError, match="unknown split 'tset'; closest: test"):
        figures.geometry(result, split="tset")


def cells(axes):
    return {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}


def framed(axes):
    return [(round(p.get_y() + 0.46), round(p.get_x() + 0.46)) for p in axes.patches]


def test_grid_shows_means_and_half_intervals_frames_the_best_of_each_row_and_greys_what_is_missing():
    settings = [
        setting("deep", mean, layer=layer, rate=rate)
        for layer, rate, mean in (("b", 0.5, 0.4), ("b", 0.1, 0.6), ("a", 0.5, 0.7))
    ]
    axes = figures.grid(study(SWEEP[0], *settings), x="rate", rows="layer")
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(drawn.filled(np.nan), [[0.6, 0.4], [np.nan, 0.7]])
    assert ticks(axes.xaxis) == ["0.1", "0.5"]
    assert ticks(axes.yaxis) == ["b", "a"]
    half = f"±{HALF:.3f}"
    assert cells(axes) == {(0, 0): f"0.600\n{half}", (0, 1): f"0.400\n{half}", (1, 1): f"0.700\n{half}"}
    assert framed(axes) == [(0, 0), (1, 1)]
    assert to_hex(axes.images[0].cmap.get_bad()) == "#bfbfbf"
    assert axes.get_title() == f"plain: 0.600 {half}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rate", "layer")


def test_grid_gives_arms_with_one_of_the_axes_a_row_or_a_column():
    settings = [
        *(setting("single", 0.5 + n / 1000, train_samples=n, layer=layer) for n in (100, 200) for layer in LAYERS),
        *(setting("adaptive", 0.3, train_samples=n) for n in (100, 200)),
    ]
    axes = figures.grid(study(*settings), x="layer", rows="train_samples")
    assert ticks(axes.xaxis) == [*LAYERS, "adaptive"]
    assert ticks(axes.yaxis) == ["100", "200"]
    np.testing.assert_allclose(axes.images[0].get_array()[1], [0.7, 0.7, 0.7, 0.3])
    turned = figures.grid(study(*settings), x="train_samples", rows="layer")
    assert ticks(turned.yaxis) == [*LAYERS, "adaptive"]


def test_grid_takes_combinations_as_rows():
    settings = [
        *(setting("plain", 0.5, baseline=True, labels=share) for share in (0.5, 1.0)),
        *(setting("mixed", 0.6, labels=share, input_augment=a) for share in (0.5, 1.0) for a in ("cutmix", "mixup")),
    ]
    axes = figures.grid(study(*settings), x="labels", rows=["arm", "input_augment"])
    assert ticks(axes.yaxis) == ["mixed, cutmix", "mixed, mixup", "plain"]


def test_grid_of_a_score_that_is_better_when_lower_frames_the_lowest():
    settings = [setting("deep", mean, layer=layer, rate=0.5) for layer, mean in (("a", 0.4), ("b", 0.6))]
    axes = figures.grid(study(*settings), x="layer", rows="rate", metric="uniformity_test")
    assert framed(axes) == [(0, 1)]


def test_grid_refuses_settings_in_one_cell_and_none():
    with pytest.raises(ShapeError, match="'deep' that differ in stop_gradient would be one point"):
        figures.grid(study(*SWEEP), x="layer", rows="arm")
    with pytest.raises(DataError, match="has the axes 'layer' or stop_gradient"):
        figures.grid(study(*SWEEP), x="layer", rows="stop_gradient", arms=["plain"])


def test_freeze_costs_show_the_gain_over_the_unfrozen_run_of_each_start():
    settings = []
    for start, cost in ((None, 0.1), ("pretrained", 0.2)):
        free, frozen = f"free-{start}", f"frozen-{start}"
        settings += [setting(free, 0.6, baseline=True, start=start, layer=layer) for layer in LAYERS]
        settings += [
            setting(frozen, 0.6 - cost * (1 + (part == "after")), start=start, layer=layer, part=part)
            for layer in LAYERS
            for part in ("before", "after")
        ]
    result = study(*settings)
    for row in result.runs[3 * len(LAYERS)]["scores"][""]:  # seed 0 of freezing before layer1
        row["probe"] -= 0.3
    random, pretrained = figures.freeze_costs(result).axes
    assert [axes.get_title() for axes in (random, pretrained)] == ["from random weights", "from pretrained weights"]
    means, low, high = bars(random, "before")
    np.testing.assert_allclose(means, [-0.2, -0.1, -0.1])  # -0.4, -0.1, -0.1 at layer1
    reach = T2 * np.std([-0.4, -0.1, -0.1], ddof=1) / math.sqrt(3)
    np.testing.assert_allclose((low[0], high[0]), (-0.2 - reach, -0.2 + reach))
    np.testing.assert_allclose(bars(random, "after")[0], [-0.2] * 3)
    np.testing.assert_allclose(bars(pretrained, "before")[0], [-0.2] * 3)
    assert ticks(random.xaxis) == list(LAYERS)
    assert legend(pretrained) == ["before", "after"]
    assert random.get_ylabel() == "gain over the unfrozen run:\nlogistic regression, test accuracy"
    with pytest.raises(DataError, match=r"no runs with an axis freeze\.part"):
        figures.freeze_costs(study(*SWEEP))


def everything(**changes):
    drawings = [
        Drawing(kind="sweep", name="by_layer", metric="top1", lines=("arm", "stop_gradient")),
        Drawing(kind="epochs", name="over_epochs", lines=("arm", "layer", "stop_gradient")),
        Drawing(kind="similarity", name="maps", arms=("deep",)),
        Drawing(kind="geometry", name="plane"),
        Drawing(kind="grid", name="table", x="layer", lines=("stop_gradient",)),
        Drawing(kind="sweep", name="there", transfer=True),
    ]
    content = [{**drawing.model_dump(mode="json"), **changes.get(drawing.name, {})} for drawing in drawings]
    return study(*SWEEP, data=("", "other"), similarity=MAPS, starts={"pretrained": {}}, figures=content)


def test_draw_all_draws_every_figure_of_the_study_by_name():
    drawn = figures.draw_all(everything())
    assert list(drawn) == ["by_layer", "over_epochs", "maps", "plane", "table", "there"]
    assert drawn["by_layer"].get_ylabel() == "classifier, test accuracy"
    assert legend(drawn["over_epochs"])[1] == "deep, layer1, no stop"
    assert next(iter(shown(drawn["maps"]))) == "untrained"
    assert drawn["plane"].get_xlabel().startswith("uniformity")
    assert (drawn["table"].get_xlabel(), ticks(drawn["table"].yaxis)) == ("layer", ["no stop", "stop"])
    assert drawn["there"].get_ylabel().endswith("on other")
    np.testing.assert_allclose(bars(drawn["there"], "stop")[0], [0.5, 0.6, 0.7])
    assert figures.draw_all(study(*SWEEP)) == {}


FAULTS = {
    "by_layer": ({"metric": "prob"}, UnknownNameError, "figure 'by_layer': unknown metric 'prob'"),
    "maps": ({"transfer": True}, DataError, "figure 'maps': similarity is measured on the run's own data only"),
    "plane": ({"arms": ["nobody"]}, UnknownNameError, "figure 'plane': unknown arm 'nobody'"),
    "table": ({"lines": []}, ShapeError, "figure 'table': a grid needs its rows"),
    "over_epochs": ({"lines": ["layer"]}, ShapeError, "figure 'over_epochs': settings of 'deep'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_carries_the_drawings_name_and_leaves_no_figure_open(name):
    changes, kind, message = FAULTS[name]
    with pytest.raises(kind, match=message) as caught:
        figures.draw_all(everything(**{name: changes}))
    assert isinstance(caught.value, LayerlensError)
    assert not plt.get_fignums()


def test_transfer_without_other_data_is_refused():
    with pytest.raises(DataError, match="figure 'there': no finished run of deep was scored on other data"):
        figures.draw(study(*SWEEP), Drawing(kind="sweep", name="there", arms=("deep",), transfer=True))


def test_axes_of_ones_own_are_drawn_on_and_the_global_style_stays():
    before, result = dict(mpl.rcParams), study(*SWEEP)
    for draw in (
        figures.sweep, figures.over_epochs, figures.geometry,
        lambda given, ax: figures.grid(given, x="layer", rows="stop_gradient", ax=ax),
    ):  # fmt: skip
        _, own = plt.subplots()
        assert draw(result, ax=own) is own
    assert dict(mpl.rcParams) == before
