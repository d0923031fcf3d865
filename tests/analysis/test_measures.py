"""What `MEASURES` promises holds for every measure in it: range, direction, invariances, options, and its text."""

import inspect
import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from layerlens.analysis.measures import (
    LINEAR,
    MEASURES,
    PERMUTATION,
    ROTATION,
    SAMPLE_SCALING,
    SCALING,
    TRANSLATION,
    make_pair_measure,
    parse_measure,
)
from layerlens.analysis.profiles import measure_layers
from layerlens.analysis.similarity import similarity_matrix
from layerlens.analysis.whole_set import cka
from layerlens.errors import ConfigError, DegenerateError, LayerlensError, UnknownNameError

PAIRS, LAYERS, VIEWS = ([m.name for m in MEASURES.values() if m.over == over] for over in ("pairs", "layers", "views"))
ESTIMATORS = ["minibatch", "debiased", "biased", "whole-set"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(name, x, y, **options):
    """A measure of two layers; of the first alone; or of a sample's two views, which a layer made x and y of."""
    measure = MEASURES[name]
    if name == "cka":
        return cka(x, y, **{"estimator": "debiased", **options})
    if measure.over == "pairs":
        worker = make_pair_measure(measure, {**measure.options, **options})
        return worker.compare(worker.prepare(x), worker.prepare(y))
    work = measure.load()
    if name == "invariance":
        return work(x, y[:, None])
    if name == "diversity":
        return work(torch.stack([x, y], 1))
    return work(x, y, **options) if measure.over == "views" else work(x, **options)


def related_pair(n=60, p=8):
    """Two layers of equal width that share three factors, neither centred."""
    shared = draw(n, 3)
    x = shared @ draw(3, p, seed=1) + 0.7 * draw(n, p, seed=2) + 0.3
    y = shared @ draw(3, p, seed=3) + 0.7 * draw(n, p, seed=4) - 0.2
    return x * torch.linspace(1, 2, p), y * torch.linspace(2, 1, p)


# --- the entries themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_an_entry_says_what_it_is(name):
    measure = MEASURES[name]
    assert measure.name == name
    assert measure.over in ("pairs", "layers", "views")
    assert -math.inf < measure.low < measure.high
    assert measure.estimators
    assert set(measure.estimators) <= set(ESTIMATORS)
    for words in (measure.about, measure.cost, measure.source, measure.oracle, measure.higher):
        assert words.strip()
        assert "\n" not in words
    assert any(character.isdigit() for character in measure.source)  # the year


@pytest.mark.parametrize("name", MEASURES)
def test_an_entry_leads_to_the_code_with_the_defaults_that_it_names(name):
    measure = MEASURES[name]
    work = measure.load()
    assert (work.__module__, work.__name__) == tuple(f"layerlens.analysis.{measure.home}".split(":"))
    parameters = inspect.signature(work).parameters
    elsewhere = {"estimator", "views"}  # another class computes it; the number of passes
    for option, default in measure.options.items():
        assert option in elsewhere or parameters[option].default == default


def test_an_entry_is_frozen():
    with pytest.raises(FrozenInstanceError):
        MEASURES["cka"].low = 0


@pytest.mark.parametrize("name", PAIRS)
def test_the_words_for_higher_agree_with_the_direction(name):
    assert MEASURES[name].higher == ("more alike" if MEASURES[name].higher_is_alike else "less alike")


# --- range -------------------------------------------------------------------------------------------------------

DATA = {
    "random": draw(24, 6),
    "other": draw(24, 6, seed=1),
    "wide": draw(24, 300, seed=2),
    "narrow": draw(24, 2, seed=3),
    "far from zero": 100 + draw(24, 6, seed=4),
    "nearly constant": 1 + 1e-3 * draw(24, 6, seed=5),
    "one direction": draw(24, 1, seed=6) @ draw(1, 6, seed=7),
    "every sample twice": draw(12, 6, seed=8).repeat(2, 1),
    "two points": torch.tensor([[1.0, 2, 0, 0], [-1, 0, 0, 1]], dtype=torch.float64).repeat(12, 1),
    "one outlier": torch.cat([draw(23, 6, seed=9), 1e4 * draw(1, 6, seed=10)]),
    "heavy tails": draw(24, 6, seed=11) ** 5,
    "half zeros": draw(24, 40, seed=12).relu(),
    "the opposite of random": -draw(24, 6),
    "one-hot": torch.eye(24, dtype=torch.float64),
}
UNDEFINED = {
    "cka": ["one-hot"],
    "rsa_spearman": ["one-hot"],
    "rsa_pearson": ["one-hot"],
    "intrinsic_dimension": ["every sample twice", "two points", "one-hot"],
}  # 0/0: all samples equally far apart, or nothing but copies
SIX_WIDE = [name for name, data in DATA.items() if data.shape[1] == 6]


@pytest.mark.parametrize("name", MEASURES)
def test_the_declared_range_holds(name):
    measure = MEASURES[name]
    firsts, seconds = {"pairs": (DATA, DATA), "layers": (DATA, ["random"]), "views": (SIX_WIDE, SIX_WIDE)}[measure.over]
    for first in firsts:
        for second in seconds:
            x, y = DATA[first].float(), DATA[second].float()
            if {first, second} & set(UNDEFINED.get(name, [])):
                with pytest.raises(DegenerateError):
                    score(name, x, y)
            else:
                found = score(name, x, y)
                assert measure.low - 1e-9 <= found <= measure.high + 1e-9, (first, second, found)


def test_the_declared_range_of_cka_holds_for_the_biased_estimator():
    for x in DATA.values():
        for y in DATA.values():
            assert -1e-9 <= score("cka", x.float(), y.float(), estimator="biased") <= 1 + 1e-9


@pytest.mark.parametrize(
    "name",
    list(MEASURES),
)
def test_layers_in_float64_score_what_they_score_in_float32(name):
    x, y = 100 + draw(24, 30), 100 + draw(24, 30) + 0.5 * draw(24, 30, seed=1)
    assert score(name, x, y) == pytest.approx(score(name, x.float(), y.float()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["effective_rank", "rankme", "participation_ratio"])
def test_a_count_of_directions_is_at_most_the_smaller_side(name):
    for data in DATA.values():
        assert score(name, data, None) <= min(len(data) - (name != "rankme"), data.shape[1]) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "x", "y", "low"),
    [
        ("cka", [1.0, 1, 0, 0], [1.0, 0, 1, 0], -0.5),
        ("mean_cca", [1.0, 1, -1, -1], [1.0, -1, 1, -1], 0),
        ("svcca", [1.0, 1, -1, -1], [1.0, -1, 1, -1], 0),
        ("pwcca", [1.0, 1, -1, -1], [1.0, -1, 1, -1], 0),
        ("procrustes", [1.0, 1, -1, -1], [1.0, -1, 1, -1], math.pi / 2),
        ("procrustes_squared", [1.0, 1, -1, -1], [1.0, -1, 1, -1], 2),
        ("rankme", [1.0, 1, -1, -1], None, 1),
        ("effective_rank", [1.0, 1, -1, -1], None, 1),
        ("participation_ratio", [1.0, 1, -1, -1], None, 1),
        ("uniformity", [1.0, -1], None, -8),
        ("alignment", [1.0, -1], [-3.0, 2], 4),
        ("invariance", [1.0, -1], [-3.0, 2], -1),
        ("diversity", [1.0, -1], [-3.0, 2], -1),
    ],
)
def test_the_far_end_of_the_range_is_reached(name, x, y, low):
    """By layers, or views, of one feature that are opposite, at right angles or on one line."""
    x, y = (None if side is None else torch.tensor(side)[:, None] for side in (x, y))
    assert score(name, x, y) == pytest.approx(low, abs=1e-6)
    assert low in (MEASURES[name].low, MEASURES[name].high) or name == "cka"


# --- direction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_is_most_alike_itself_less_a_noisy_copy_and_least_an_unrelated_layer(name):
    measure, x = MEASURES[name], draw(200, 10)
    noisy, noisier, unrelated = x + 0.4 * draw(200, 10, seed=1), x + draw(200, 10, seed=1), draw(200, 10, seed=2)
    sign = 1 if measure.higher_is_alike else -1
    itself, near, middle, far = (sign * score(name, x, y) for y in (x, noisy, noisier, unrelated))
    assert itself == pytest.approx(measure.high if measure.higher_is_alike else -measure.low, abs=1e-6)
    gap = 0.02 * (measure.high - measure.low)
    assert itself > near + gap > middle + 2 * gap > far + 3 * gap


CLUSTER, SPREAD = 2 + 0.3 * draw(80, 10), draw(80, 10)
TOWARDS = {  # for each word: data that score lower, data that score higher
    "more directions": ((draw(80, 3) @ draw(3, 10, seed=1), None), (SPREAD, None)),
    "more dimensions": ((draw(80, 2) @ draw(2, 10, seed=1), None), (SPREAD, None)),
    "less uniform": ((SPREAD, None), (CLUSTER, None)),
    "less aligned": ((SPREAD, SPREAD + 0.1 * draw(80, 10, seed=1)), (SPREAD, SPREAD + draw(80, 10, seed=1))),
    "more invariant": ((SPREAD, SPREAD + draw(80, 10, seed=1)), (SPREAD, SPREAD + 0.1 * draw(80, 10, seed=1))),
    "less diverse": ((SPREAD, SPREAD + draw(80, 10, seed=1)), (SPREAD, SPREAD + 0.1 * draw(80, 10, seed=1))),
}


@pytest.mark.parametrize("name", LAYERS + VIEWS)
def test_a_higher_value_means_what_the_entry_says(name):
    lower, higher = TOWARDS[MEASURES[name].higher]
    assert score(name, *lower) + 0.1 < score(name, *higher)


@pytest.mark.parametrize(("name", "best"), [("alignment", 0.0), ("invariance", 1.0), ("diversity", 1.0)])
def test_equal_views_reach_the_end_of_the_range(name, best):
    assert score(name, SPREAD, SPREAD) == pytest.approx(best, abs=1e-12)
    assert best in (MEASURES[name].low, MEASURES[name].high)


# --- invariances -------------------------------------------------------------------------------------------------

CHANGES = {
    ROTATION: lambda x: x @ torch.linalg.qr(draw(8, 8, seed=9))[0],
    SCALING: lambda x: 7.3e-3 * x,
    TRANSLATION: lambda x: x + torch.arange(8),
    PERMUTATION: lambda x: x[:, torch.randperm(8, generator=torch.Generator().manual_seed(1))],
    LINEAR: lambda x: x @ (draw(8, 8, seed=9) * torch.logspace(-1, 1, 8, dtype=torch.float64)),
    SAMPLE_SCALING: lambda x: x * (0.2 + draw(len(x), 1, seed=8).abs()),
}


def changed(name, change):
    """Of a pair only one layer changes, of a layer's views all."""
    x, y = related_pair()
    return score(name, change(x), change(y) if MEASURES[name].over == "views" else y)


def moved(name, change):
    return abs(changed(name, CHANGES[change]) - score(name, *related_pair()))


IGNORED = [(name, change) for name, measure in MEASURES.items() for change in measure.invariances]
NOTICED = [(name, change) for name in MEASURES for change in CHANGES if (name, change) not in IGNORED]


@pytest.mark.parametrize(("name", "change"), IGNORED)
def test_a_declared_invariance_holds(name, change):
    assert moved(name, change) < 1e-7


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, c in IGNORED if MEASURES[n].over == "pairs"])
def test_a_declared_invariance_holds_for_the_second_layer_too(name, change):
    x, y = related_pair()
    assert score(name, x, CHANGES[change](y)) == pytest.approx(score(name, x, y), abs=1e-7)


@pytest.mark.parametrize(("name", "change"), NOTICED)
def test_a_change_that_is_not_declared_is_noticed(name, change):
    assert moved(name, change) > 1e-3


def test_no_measure_ignores_everything():
    assert {name for name, _ in NOTICED} == set(MEASURES)


# --- options -----------------------------------------------------------------------------------------------------

OTHER = {  # another value of each option
    ("cka", "kernel"): "rbf",
    ("cka", "rbf_factor"): 0.5,
    ("cka", "estimator"): "biased",
    ("svcca", "variance"): 0.6,
    ("rsa_spearman", "distance"): "euclidean",
    ("rsa_pearson", "distance"): "cosine",
    ("mutual_knn", "k"): 3,
    ("intrinsic_dimension", "discard"): 0.4,
    ("uniformity", "t"): 0.5,
    ("alignment", "alpha"): 1.0,
    ("invariance", "views"): 5,
    ("diversity", "views"): 5,
}


def noisy_view(x):
    return x + 0.5 * torch.randn(x.shape, dtype=x.dtype)


def asked(text):
    """What a user gets who asks for a measure of a tiny model; views are drawn from the same seed each time."""
    x, y = related_pair()
    rows = torch.cat([x, y], 1).float()
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        model[0].weight.copy_(draw(8, 16, seed=5))
        model[0].bias.zero_()
        if MEASURES[text.partition(",")[0]].over == "pairs":
            return similarity_matrix(model, [rows], "input,0", measure=text, groups=0).values[0, 1]
        return measure_layers(model, [rows], "0", measure=text, views=noisy_view, groups=0).values[0]


def test_every_option_has_a_case_here():
    assert set(OTHER) == {(name, option) for name, measure in MEASURES.items() for option in measure.options}


@pytest.mark.parametrize(("name", "option"), OTHER)
def test_an_option_is_accepted_and_changes_the_value(name, option):
    kernel = "kernel=rbf," if option == "rbf_factor" else ""
    plain = asked(f"{name},{kernel}{option}={MEASURES[name].options[option]}")
    found = asked(f"{name},{kernel}{option}={OTHER[name, option]}")
    assert plain == asked(f"{name},{kernel}".rstrip(","))
    assert math.isfinite(found)
    assert abs(found - plain) > 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cka,kernel=rfb", "unknown kernel 'rfb'; closest: rbf"),
        ("cka,kernel=rbf,rbf_factor=0", "rbf_factor=0; allowed: above 0"),
        ("cka,estimator=whole-set", "unknown estimator 'whole-set'.*debiased"),
        ("svcca,variance=1.5", "variance=1.5; allowed: above 0, at most 1"),
        ("svcca,variance=0", "variance=0; allowed"),
        ("rsa_spearman,distance=manhattan", "distance='manhattan'; allowed: correlation, euclidean, cosine"),
        ("rsa_pearson,distance=manhattan", "distance='manhattan'; allowed"),
        ("mutual_knn,k=0", "k=0; allowed: a whole number from 1"),
        ("mutual_knn,k=60", "k=60 with 60 samples; allowed: 1 to 59"),
        ("intrinsic_dimension,discard=1", "discard=1; allowed: from 0, below 1"),
        ("uniformity,t=0", "t=0; allowed: above 0"),
        ("invariance,views=0", "views=0; invariance needs 1 or more"),
        ("diversity,views=1", "views=1; diversity needs 2 or more"),
        ("alignment,alpha=0", "alpha=0"),
        ("alignment,alpha=-1", "alpha=-1"),
        ("uniformity,t=nan", "t=nan"),
        ("diversity,views=2.7", r"views=2\.7"),
    ],
)
def test_a_value_outside_the_range_of_an_option_is_refused(text, message):
    with pytest.raises(LayerlensError, match=message):
        asked(text)


@pytest.mark.parametrize(
    ("name", "option", "word"),
    [
        ("mutual_knn", "k", "ten"),
        ("mutual_knn", "k", 2.5),
        ("rsa_spearman", "distance", 3),
        ("cka", "kernel", 3),
        ("cka", "estimator", 3),
        ("cka", "rbf_factor", "wide"),
        ("svcca", "variance", "most"),
        ("intrinsic_dimension", "discard", "some"),
        ("uniformity", "t", "two"),
        ("alignment", "alpha", "two"),
        ("diversity", "views", "two"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_the_name_of_its_option(name, option, word):
    with pytest.raises(LayerlensError, match=option):
        asked(f"{name},{option}={word}")


@pytest.mark.parametrize("name", MEASURES)
def test_an_option_that_a_measure_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name},colour=3' has no option 'colour'"):
        parse_measure(f"{name},colour=3")


# --- specifications ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_a_bare_name_means_the_defaults(name):
    measure, options = parse_measure(name)
    assert measure is MEASURES[name]
    assert options == measure.options
    options["k"] = "changed"
    assert parse_measure(name)[1] == measure.options


def test_dashes_and_spaces_around_a_name_do_not_matter():
    assert parse_measure(" mutual-knn,k=3 ")[1] == {"k": 3}


def test_given_options_join_the_defaults():
    assert parse_measure("cka,kernel=rbf")[1] == {"kernel": "rbf", "rbf_factor": 1.0, "estimator": "minibatch"}


def test_an_unknown_measure_lists_the_closest_and_where_to_read_on():
    with pytest.raises(UnknownNameError, match=r"unknown measure 'svca'; closest: svcca.*`layerlens measures`"):
        parse_measure("svca")


def test_a_misspelt_option_lists_the_closest():
    with pytest.raises(ConfigError, match="no option 'varianze'; closest: variance"):
        parse_measure("svcca,varianze=0.9")


def test_what_a_fixed_measure_fixes_is_no_option():
    with pytest.raises(ConfigError, match="no option 'correlation'"):
        parse_measure("rsa_spearman,correlation=pearson")
    with pytest.raises(ConfigError, match="no option 'squared'; it takes none"):
        parse_measure("procrustes,squared=true")


def test_an_argument_is_answered_with_the_right_form():
    with pytest.raises(ConfigError, match=r"'svcca:0.9': options follow the name with commas"):
        parse_measure("svcca:0.9")


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_measure_asked_of_single_layers_names_the_function_to_use(name):
    with pytest.raises(ConfigError, match=f"{name} compares pairs of layers; use similarity_matrix"):
        measure_layers(nn.Identity(), [draw(8, 3)], measure=name)


@pytest.mark.parametrize("name", LAYERS + VIEWS)
def test_a_measure_of_single_layers_asked_of_pairs_names_the_function_to_use(name):
    with pytest.raises(ConfigError, match=f"{name} is a measure of single layers; use measure_layers"):
        similarity_matrix(nn.Identity(), [draw(8, 3)], measure=name)


@pytest.mark.parametrize(("name", "other"), [("rsa_spearman", "rsa_pearson"), ("procrustes", "procrustes_squared")])
def test_measures_of_one_class_are_told_apart(name, other):
    x, y = related_pair()
    assert abs(score(name, x, y) - score(other, x, y)) > 1e-3
