"""Every measure in one place: what it is, its range, direction, invariances, cost and source.

`MEASURES` is what `layerlens measures` lists, what `similarity_matrix` and `measure_layers` compute, and what the
tests check.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerlens.errors import ConfigError, UnknownNameError, check_known
from layerlens.specs import parse_spec

INF = math.inf
ROTATION, SCALING, TRANSLATION, PERMUTATION = "rotation", "isotropic scaling", "translation", "feature permutation"
LINEAR, SAMPLE_SCALING = "invertible linear map", "scaling of each sample"
RIGID = (ROTATION, SCALING, TRANSLATION, PERMUTATION)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a measure promises.

    Attributes:
        name: As it is asked for.
        about: One line.
        over: `pairs` of layers, single `layers`, or `views`: single layers under random views of the input.
        low, high: Its range; infinite where there is no bound.
        higher: What a higher value means, such as `more alike`.
        higher_is_alike: For pairs: whether more alike layers score higher.
        invariances: Changes of a layer's features that leave it as it is.
        estimators: Ways over the data: `minibatch` (streaming), `debiased`, `biased`, `whole-set`.
        cost: Operations for n samples of p features.
        options: Name and default of each.
        unbias: For pairs: whether jackknife intervals take off the bias that falls with 1/n.
        source: Where it is defined.
        oracle: What independent implementation the tests compare with.
        home: Module and name of the class or function that computes it.
    """

    name: str
    about: str
    over: str
    low: float
    high: float
    higher: str
    higher_is_alike: bool = True
    invariances: tuple[str, ...]
    estimators: tuple[str, ...] = ("whole-set",)
    cost: str
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str
    oracle: str
    home: str
    unbias: bool = True

    def load(self) -> Any:
        """The class or function itself."""
        module, name = self.home.split(":")
        return getattr(importlib.import_module(f"layerlens.analysis.{module}"), name)


_ALL = (
    Measure(
        name="cka", about="centred kernel alignment, linear or RBF", over="pairs", low=-1, high=1, higher="more alike",
        invariances=RIGID, estimators=("minibatch", "debiased", "biased"),
        cost="n²p per layer, n² per pair; or np² per pair for few features",
        options={"kernel": "linear", "rbf_factor": 1.0, "estimator": "minibatch"},
        source="Kornblith et al. 2019, arXiv:1905.00414; Song et al. 2012; Nguyen et al. 2021, arXiv:2010.15327",
        oracle="definition in float64; torch-cka, rsatoolbox, netrep in the benchmark", home="cka:StreamingCKA",
    ),
    Measure(
        name="mean_cca", about="mean canonical correlation", over="pairs", low=0, high=1, higher="more alike",
        invariances=(LINEAR, *RIGID), cost="n·min(n, p)² per layer and per pair",
        source="Hotelling 1936; Raghu et al. 2017, arXiv:1706.05806", oracle="canonical correlations by QR (SciPy)",
        home="subspace:MeanCCA",
    ),
    Measure(
        name="svcca", about="mean canonical correlation of the leading singular directions", over="pairs", low=0,
        high=1, higher="more alike", invariances=RIGID, cost="n·min(n, p)² per layer, less per pair",
        options={"variance": 0.99}, source="Raghu et al. 2017, arXiv:1706.05806",
        oracle="SVD and QR (SciPy)", home="subspace:SVCCA",
    ),
    Measure(
        name="pwcca", about="canonical correlations weighted by the neurons they account for", over="pairs", low=0,
        high=1, higher="more alike", invariances=(SCALING, TRANSLATION, PERMUTATION),
        cost="n·min(n, p)² per layer and per pair, n·p per pair", source="Morcos et al. 2018, arXiv:1806.05759",
        oracle="definition in float64 (SciPy)", home="subspace:PWCCA",
    ),
    Measure(
        name="procrustes", about="angle between the layers after the best rotation", over="pairs", low=0,
        high=math.pi / 2, higher="less alike", higher_is_alike=False, invariances=RIGID,
        cost="n·min(n, p)² per layer and per pair", source="Williams et al. 2021, arXiv:2110.14739",
        oracle="scipy.linalg.orthogonal_procrustes; netrep in the benchmark", home="subspace:Procrustes",
    ),
    Measure(
        name="procrustes_squared", about="squared distance of the layers after the best rotation", over="pairs", low=0,
        high=2, higher="less alike", higher_is_alike=False, invariances=RIGID,
        cost="n·min(n, p)² per layer and per pair", source="Williams et al. 2021, arXiv:2110.14739",
        oracle="scipy.linalg.orthogonal_procrustes", home="subspace:Procrustes",
    ),
    Measure(
        name="rsa_spearman", about="rank correlation of the samples' dissimilarities", over="pairs", low=-1, high=1,
        higher="more alike", invariances=(SCALING, PERMUTATION, SAMPLE_SCALING), cost="n²p per layer, n² per pair",
        options={"distance": "correlation"}, source="Kriegeskorte et al. 2008, doi:10.3389/neuro.06.004.2008",
        oracle="scipy.stats.spearmanr over pdist; rsatoolbox", home="rsa:RSA",
    ),
    Measure(
        name="rsa_pearson", about="correlation of the samples' dissimilarities", over="pairs", low=-1, high=1,
        higher="more alike", invariances=(SCALING, PERMUTATION, SAMPLE_SCALING), cost="n²p per layer, n² per pair",
        options={"distance": "correlation"}, source="Kriegeskorte et al. 2008, doi:10.3389/neuro.06.004.2008",
        oracle="scipy.stats.pearsonr over pdist; rsatoolbox", home="rsa:RSA",
    ),
    Measure(
        name="mutual_knn", about="share of nearest neighbours in common", over="pairs", low=0, high=1,
        higher="more alike", invariances=(ROTATION, SCALING, PERMUTATION, SAMPLE_SCALING),
        cost="n²p per layer, nk per pair", options={"k": 10}, source="Huh et al. 2024, arXiv:2405.07987",
        oracle="sklearn.neighbors", home="neighbours:MutualKNN", unbias=False,
    ),
    Measure(
        name="effective_rank", about="directions in use: exp of the entropy of the centred singular values",
        over="layers", low=1, high=INF, higher="more directions", invariances=RIGID, cost="n²p or np² + min(n, p)³",
        estimators=("minibatch", "whole-set"), source="Roy & Vetterli 2007", oracle="SVD (NumPy)",
        home="dimension:effective_rank",
    ),
    Measure(
        name="rankme", about="the same without centring", over="layers", low=1, high=INF, higher="more directions",
        invariances=(ROTATION, SCALING, PERMUTATION), cost="n²p or np² + min(n, p)³",
        estimators=("minibatch", "whole-set"), source="Garrido et al. 2022, arXiv:2210.02885", oracle="SVD (NumPy)",
        home="dimension:rankme",
    ),
    Measure(
        name="participation_ratio", about="directions that carry the variance: (Σλ)² / Σλ²", over="layers", low=1,
        high=INF, higher="more directions", invariances=RIGID, cost="n²p or np²", estimators=("minibatch", "whole-set"),
        source="Gao et al. 2017, doi:10.1101/214262", oracle="covariance eigenvalues (NumPy)",
        home="dimension:participation_ratio",
    ),
    Measure(
        name="intrinsic_dimension", about="dimension of the surface that the samples lie on (TwoNN)", over="layers",
        low=0, high=INF, higher="more dimensions", invariances=RIGID, cost="n²p", options={"discard": 0.1},
        estimators=("minibatch", "whole-set"), source="Facco et al. 2017, doi:10.1038/s41598-017-11873-y",
        oracle="scikit-dimension", home="neighbours:two_nn",
    ),
    Measure(
        name="uniformity", about="log mean Gaussian potential on the sphere (range for t = 2)", over="layers",
        low=-8, high=0, higher="less uniform", invariances=(ROTATION, SCALING, PERMUTATION, SAMPLE_SCALING), cost="n²p",
        options={"t": 2.0}, estimators=("minibatch", "whole-set"), source="Wang & Isola 2020, arXiv:2005.10242",
        oracle="the authors' formula by torch.pdist", home="geometry:uniformity",
    ),
    Measure(
        name="alignment", about="mean squared distance of two views on the sphere (range for alpha = 2)",
        over="views", low=0, high=4, higher="less aligned", cost="np",
        invariances=(ROTATION, SCALING, PERMUTATION, SAMPLE_SCALING),
        options={"alpha": 2.0}, source="Wang & Isola 2020, arXiv:2005.10242", oracle="definition in float64",
        home="geometry:alignment",
    ),
    Measure(
        name="invariance", about="mean cosine of a sample with its views", over="views", low=-1, high=1,
        higher="more invariant", invariances=(ROTATION, SCALING, PERMUTATION, SAMPLE_SCALING), cost="np per view",
        options={"views": 2}, source="formula derived from the wording of arXiv:2310.18850",
        oracle="definition in float64", home="geometry:invariance",
    ),
    Measure(
        name="diversity", about="mean cosine of two views of a sample", over="views", low=-1, high=1,
        higher="less diverse", invariances=(ROTATION, SCALING, PERMUTATION, SAMPLE_SCALING), cost="np per view",
        options={"views": 2}, source="formula derived from the wording of arXiv:2310.18850",
        oracle="definition in float64", home="geometry:diversity",
    ),
)  # fmt: skip
MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in _ALL}
_FIXED: dict[str, dict[str, Any]] = {
    "procrustes_squared": {"squared": True}, "rsa_spearman": {"correlation": "spearman"},
    "rsa_pearson": {"correlation": "pearson"},
}  # fmt: skip


def parse_measure(text: str, *, over: tuple[str, ...] = ("pairs", "layers", "views")) -> tuple[Measure, dict[str, Any]]:
    """A measure and its options from a specification such as `svcca,variance=0.9`.

    Args:
        text: Name, then options.
        over: Kinds that are allowed here.

    Raises:
        UnknownNameError: No such measure.
        ConfigError: An option that it does not have, or a measure of another kind.

    >>> measure, options = parse_measure("mutual_knn,k=5")
    >>> measure.name, options
    ('mutual_knn', {'k': 5})
    """
    spec = parse_spec(text)
    name = spec.kind.replace("-", "_")
    try:
        check_known("measure", name, MEASURES)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; `layerlens measures` explains them") from None
    measure = MEASURES[name]
    spec.check_no_argument()
    spec.check_options(measure.options)
    if measure.over not in over:
        right = "similarity_matrix" if measure.over == "pairs" else "measure_layers"
        what = "compares pairs of layers" if measure.over == "pairs" else "is a measure of single layers"
        raise ConfigError(f"{name} {what}; use {right}")
    for key, value in spec.options.items():
        _check_type(key, value, measure.options[key])
    return measure, {**measure.options, **spec.options}


def _check_type(name: str, value: Any, default: Any) -> None:
    """See that an option is of the kind of its default; a whole number passes for any number."""
    if isinstance(default, str):
        fits, wanted = isinstance(value, str), "a name"
    elif isinstance(default, int):
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool) and value == value, "a number"
    if not fits:
        raise ConfigError(f"{name}={value}; allowed: {wanted}, such as {default}")


def make_pair_measure(measure: Measure, options: Mapping[str, Any]) -> Any:
    """The object that prepares layers and compares two: `prepare(rows)`, `compare(a, b)`."""
    return measure.load()(**{**_FIXED.get(measure.name, {}), **options})
