"""Figures of any measure, of two models and of a run's checkpoints, by what they show; never pixels."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from layerlens import figures
from layerlens.analysis.measures import MEASURES
from layerlens.analysis.results import CrossSimilarity, FilmStrip, LayerProfile, SimilarityMatrix
from layerlens.errors import ShapeError

NAN = float("nan")
PAIRS = [name for name, measure in MEASURES.items() if measure.over == "pairs"]
DISTANCES = [name for name in PAIRS if not MEASURES[name].higher_is_alike]


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


def square(values, **changes):
    values = np.array(values, dtype=float)
    count = len(values)
    given = {
        "layers": tuple(f"l{i}" for i in range(count)),
        "samples": 100,
        "weights": [],
        "participation": [1] * count,
    }
    return SimilarityMatrix(**{**given, "values": values, "low": values, "high": values, **changes})


def cross(**changes):
    """Two layers against three, one of which is constant."""
    values = np.array([[0.9, 0.2, NAN], [0.5, 0.7, NAN]])
    given = {"first": ("stem", "head"), "second": ("a", "b", "dead"), "labels": ("old", "new"), "samples": 100}
    return CrossSimilarity(**{**given, "values": values, "low": values, "high": values, "weights": [], **changes})


def strip(count, layers=3, **changes):
    """Frames whose similarity between layers grows from one to the next."""
    frames = []
    for k in range(count):
        values = np.full((layers, layers), 0.1 * (k + 1))
        np.fill_diagonal(values, 1.0)
        frames.append(square(values, **changes))
    return FilmStrip(labels=tuple(f"epoch {10 * k}" for k in range(count)), frames=tuple(frames), changes=())


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def luminance(image, value):
    """How bright a heat map shows a value."""
    return float(np.dot(image.cmap(image.norm(value))[:3], (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("measure", PAIRS)
def test_bright_means_alike_in_every_measure(measure):
    promise = MEASURES[measure]
    low, high = max(promise.low, 0), promise.high
    alike, apart = (high, low) if promise.higher_is_alike else (low, high)
    (image,) = figures.heatmap(square([[alike, apart], [apart, alike]], measure=measure)).images
    shades = [luminance(image, value) for value in np.linspace(apart, alike, 9)]
    assert shades == sorted(shades)
    assert shades[-1] - shades[0] > 0.5


@pytest.mark.parametrize("measure", PAIRS)
def test_the_colours_span_the_measures_range_from_no_similarity_on(measure):
    (image,) = figures.heatmap(square([[1, 0.5], [0.5, 1]], measure=measure)).images
    assert image.get_clim() == (0, MEASURES[measure].high)


@pytest.mark.parametrize("measure", PAIRS)
def test_title_and_colour_bar_name_the_measure(measure):
    axes = figures.heatmap(square([[1, 0.5], [0.5, 1]], measure=measure))
    bar = axes.figure.axes[1]
    assert measure.replace("_", " ").lower() in axes.get_title().lower()
    assert measure.replace("_", " ").lower() in bar.get_ylabel().lower()
    assert ("less alike" in bar.get_ylabel()) == (measure in DISTANCES)


def test_the_title_names_the_kernel_of_cka():
    axes = figures.heatmap(square([[1, 0.5], [0.5, 1]], options={"kernel": "rbf"}))
    assert axes.get_title() == "rbf CKA, 100 samples"


@pytest.mark.parametrize("measure", PAIRS)
def test_numbers_are_written_dark_on_bright_and_bright_on_dark(measure):
    promise = MEASURES[measure]
    low, high = max(promise.low, 0), promise.high
    near, far = low + 0.05 * (high - low), low + 0.95 * (high - low)
    axes = figures.heatmap(square([[0, near, far], [near, 0, near], [far, near, 0]], measure=measure))
    found = {text.get_text(): text.get_color() for text in axes.texts}
    for value in (near, far):
        shown = f"{value:.2f}".replace("0.", ".", 1)
        assert found[shown] == ("black" if luminance(axes.images[0], value) > 0.5 else "white")


def test_a_rectangle_has_the_first_model_on_the_left_and_the_second_below():
    axes = figures.heatmap(cross())
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("old", "new")
    assert [text.split() for text in ticks(axes.yaxis)] == [["stem", "0"], ["head", "1"]]
    assert [text.split() for text in ticks(axes.xaxis)] == [["a", "0"], ["b", "1"], ["dead", "2"]]
    image = axes.images[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(image, NAN), cross().values)
    assert axes.images[0].origin == "lower"


def test_a_rectangle_writes_every_number_the_diagonal_too_and_leaves_missing_ones_grey():
    axes = figures.heatmap(cross())
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): ".90", (1, 0): ".20", (0, 1): ".50", (1, 1): ".70"}
    grey = axes.images[0].cmap(np.ma.masked)
    assert grey[0] == grey[1] == grey[2]
    assert np.ma.getmaskarray(axes.images[0].get_array())[:, 2].all()


def test_a_rectangle_of_many_layers_on_one_side_writes_no_numbers():
    values = np.full((2, 13), 0.5)
    wide = cross(values=values, low=values, high=values, second=tuple(f"l{i}" for i in range(13)))
    axes = figures.heatmap(wide)
    assert not axes.texts
    assert len(ticks(axes.xaxis)) == 13
    width, height = axes.figure.get_size_inches()
    assert width > height


def test_a_film_strip_shows_the_frames_in_order_with_their_labels_and_numbers():
    film = strip(3)
    *frames, _bar = figures.film_strip(film).axes
    assert [axes.get_title() for axes in frames] == ["epoch 0", "epoch 10", "epoch 20"]
    for axes, frame in zip(frames, film.frames, strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), frame.values)
        assert axes.images[0].origin == "lower"


@pytest.mark.parametrize("measure", ["cka", *DISTANCES])
def test_all_frames_of_a_film_strip_share_one_scale_and_one_colour_bar(measure):
    film = strip(4, measure=measure)
    *frames, bar = figures.film_strip(film).axes
    assert {axes.images[0].get_clim() for axes in frames} == {(0, MEASURES[measure].high)}
    assert {axes.images[0].cmap.name for axes in frames} == {"viridis_r" if measure in DISTANCES else "viridis"}
    assert measure.replace("_", " ").lower() in bar.get_ylabel().lower()


def test_a_film_strip_breaks_into_rows_and_names_the_layers_once_a_row():
    *cells, _bar = figures.film_strip(strip(5), columns=3).axes
    assert [axes.get_visible() for axes in cells] == [True] * 5 + [False]
    named = [any(ticks(axes.yaxis)) for axes in cells[:5]]
    assert named == [True, False, False, True, False]
    assert ticks(cells[0].yaxis) == ticks(cells[3].yaxis)
    assert all(name in text for name, text in zip(("l0", "l1", "l2"), ticks(cells[0].yaxis), strict=True))
    heights = [axes.get_subplotspec().rowspan.start for axes in cells[:5]]
    assert heights == [0, 0, 0, 1, 1]


def test_a_film_strip_of_one_frame_is_one_frame_wide():
    one, three = (figures.film_strip(strip(count)).get_size_inches() for count in (1, 3))
    assert one[0] < three[0]
    assert one[1] == three[1]


def test_a_film_strip_leaves_missing_entries_grey():
    film = FilmStrip(labels=("epoch 0",), frames=(square([[1, NAN], [NAN, NAN]]),), changes=())
    mask = np.ma.getmaskarray(figures.film_strip(film).axes[0].images[0].get_array())
    np.testing.assert_array_equal(mask, [[False, True], [True, True]])


def test_a_film_strip_of_nothing_is_refused():
    with pytest.raises(ShapeError, match="no frame to draw"):
        figures.film_strip(FilmStrip(labels=(), frames=(), changes=()))


@pytest.mark.parametrize(("measure", "value"), [("rankme", 3.0), ("alignment", 0.2), ("uniformity", -1.5)])
def test_a_profile_starts_at_zero_unless_the_measure_goes_below(measure, value):
    series = (value, 1.1 * value)
    profile = LayerProfile(
        measure=measure, layers=("a", "b"), values=series, low=series, high=series, ceiling=NAN, samples=9
    )
    axes = figures.layer_profile({"run": profile})
    low, high = axes.get_ylim()
    assert (low == 0) == (value > 0)
    assert low <= min(series) < max(series) <= high
    assert axes.get_ylabel().startswith(measure)


DRAWINGS = {
    "rectangle": (lambda: figures.heatmap(cross()), cross()),
    "distance": (lambda: figures.heatmap(square([[0, 1], [1, 0]], measure="procrustes")), square([[0, 1], [1, 0]])),
    "film strip": (lambda: figures.film_strip(strip(3), columns=2), strip(3)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_figure_is_saved_with_its_numbers_the_same_twice_over(name, tmp_path):
    draw, source = DRAWINGS[name]
    before = dict(mpl.rcParams)
    first, again = (figures.save_figure(draw(), tmp_path / run / "f", source, ["png"]) for run in ("one", "two"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert type(source).from_json(first[-1].read_text()).to_dict() == source.to_dict()
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_reaches_over_the_edge_of_the_figure(name):
    drawn = DRAWINGS[name][0]()
    figure = getattr(drawn, "figure", drawn)
    figure.draw_without_rendering()
    wide, high = figure.get_size_inches() * figure.dpi
    texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text() and text.get_visible()]
    assert texts
    for text in texts:
        if text.axes is not None and not text.axes.get_visible():
            continue
        box = text.get_window_extent()
        assert box.x0 > -1, text
        assert box.y0 > -1, text
        assert box.x1 < wide + 1, text
        assert box.y1 < high + 1, text
