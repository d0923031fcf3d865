"""layerlens: at which layer should you intervene?

Importing layerlens does not import torch; the public names load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from layerlens import figures as figures
    from layerlens import study_figures as study_figures
    from layerlens.activations import capture as capture
    from layerlens.activations import features as features
    from layerlens.analysis.cka import StreamingCKA as StreamingCKA
    from layerlens.analysis.dimension import effective_rank as effective_rank
    from layerlens.analysis.dimension import participation_ratio as participation_ratio
    from layerlens.analysis.dimension import rankme as rankme
    from layerlens.analysis.geometry import alignment as alignment
    from layerlens.analysis.geometry import diversity as diversity
    from layerlens.analysis.geometry import invariance as invariance
    from layerlens.analysis.geometry import uniformity as uniformity
    from layerlens.analysis.measures import MEASURES as MEASURES
    from layerlens.analysis.neighbours import mutual_knn as mutual_knn
    from layerlens.analysis.neighbours import two_nn as two_nn
    from layerlens.analysis.profiles import measure_layers as measure_layers
    from layerlens.analysis.regions import find_regions as find_regions
    from layerlens.analysis.resampling import difference as difference
    from layerlens.analysis.resampling import entry_difference as entry_difference
    from layerlens.analysis.results import Caution as Caution
    from layerlens.analysis.results import CrossSimilarity as CrossSimilarity
    from layerlens.analysis.results import FilmStrip as FilmStrip
    from layerlens.analysis.results import LayerProfile as LayerProfile
    from layerlens.analysis.results import SampleInfluence as SampleInfluence
    from layerlens.analysis.results import SimilarityMatrix as SimilarityMatrix
    from layerlens.analysis.rsa import rsa as rsa
    from layerlens.analysis.similarity import cka_matrix as cka_matrix
    from layerlens.analysis.similarity import sample_influence as sample_influence
    from layerlens.analysis.similarity import similarity_matrix as similarity_matrix
    from layerlens.analysis.subspace import mean_cca as mean_cca
    from layerlens.analysis.subspace import procrustes as procrustes
    from layerlens.analysis.subspace import pwcca as pwcca
    from layerlens.analysis.subspace import svcca as svcca
    from layerlens.analysis.whole_set import WholeSetCKA as WholeSetCKA
    from layerlens.analysis.whole_set import cka as cka
    from layerlens.augment.adalase import AdaLASE as AdaLASE
    from layerlens.augment.deep import DeepAugmentation as DeepAugmentation
    from layerlens.augment.dropout import TwoPassDropout as TwoPassDropout
    from layerlens.augment.graph_views import GraphViews as GraphViews
    from layerlens.augment.spatial import cutmix as cutmix
    from layerlens.augment.spatial import cutout as cutout
    from layerlens.augment.spatial import mixup as mixup
    from layerlens.augment.spatial import random_erasing as random_erasing
    from layerlens.augment.spatial import translate as translate
    from layerlens.augment.transforms import remove_principal_components as remove_principal_components
    from layerlens.augment.views import Views as Views
    from layerlens.augment.views import moco_views as moco_views
    from layerlens.augment.views import usual_views as usual_views
    from layerlens.augment.views import weak_views as weak_views
    from layerlens.data import Dataset as Dataset
    from layerlens.data import dataset_from_arrays as dataset_from_arrays
    from layerlens.data import load_data as load_data
    from layerlens.encoders import SentenceEncoder as SentenceEncoder
    from layerlens.encoders import build_encoder as build_encoder
    from layerlens.encoders import train_tokenizer as train_tokenizer
    from layerlens.errors import LayerlensError as LayerlensError
    from layerlens.evaluation.graphs import graph_scores as graph_scores
    from layerlens.evaluation.knn import knn_accuracy as knn_accuracy
    from layerlens.evaluation.probe import linear_probe as linear_probe
    from layerlens.evaluation.probe import probe_accuracy as probe_accuracy
    from layerlens.evaluation.sts import sts_scores as sts_scores
    from layerlens.evaluation.sts import text_geometry as text_geometry
    from layerlens.experiments.ablation import AdviceOutcome as AdviceOutcome
    from layerlens.experiments.ablation import FreezeEffect as FreezeEffect
    from layerlens.experiments.ablation import advice_outcome as advice_outcome
    from layerlens.experiments.ablation import freeze_effects as freeze_effects
    from layerlens.experiments.cost import estimate as estimate
    from layerlens.experiments.grid import make_plan as make_plan
    from layerlens.experiments.results import StudyResult as StudyResult
    from layerlens.experiments.results import collect as collect
    from layerlens.experiments.runner import run_plan as run_plan
    from layerlens.experiments.runner import run_study as run_study
    from layerlens.experiments.store import Store as Store
    from layerlens.experiments.study import Study as Study
    from layerlens.experiments.study import make_study as make_study
    from layerlens.experiments.study import read_study as read_study
    from layerlens.graph_models import GraphEncoder as GraphEncoder
    from layerlens.graph_models import build_graph_encoder as build_graph_encoder
    from layerlens.graphs import GraphDataset as GraphDataset
    from layerlens.graphs import dataset_from_graphs as dataset_from_graphs
    from layerlens.layers import discover as discover
    from layerlens.models import build_model as build_model
    from layerlens.models import reinitialized as reinitialized
    from layerlens.pipeline import Settings as Settings
    from layerlens.pipeline import analyze as analyze
    from layerlens.pipeline import analyze_checkpoint as analyze_checkpoint
    from layerlens.pipeline import analyze_run as analyze_run
    from layerlens.pipeline import evaluate as evaluate
    from layerlens.pipeline import film_strip as film_strip
    from layerlens.recommendation import Recommendation as Recommendation
    from layerlens.recommendation import advice_over as advice_over
    from layerlens.recommendation import recommend as recommend
    from layerlens.recommendation import settled as settled
    from layerlens.report import write_report as write_report
    from layerlens.text import TextDataset as TextDataset
    from layerlens.tokens import token_batches as token_batches
    from layerlens.training.checkpoint import load_into as load_into
    from layerlens.training.config import RunConfig as RunConfig
    from layerlens.training.config import make_config as make_config
    from layerlens.training.lars import LARS as LARS
    from layerlens.training.loop import train as train
    from layerlens.training.network import load_network as load_network
    from layerlens.training.objectives.graphcl import graph_cl as graph_cl
    from layerlens.training.objectives.moco import info_nce as info_nce
    from layerlens.training.objectives.simclr import nt_xent as nt_xent
    from layerlens.training.objectives.simcse import simcse as simcse
    from layerlens.training.objectives.supcon import sup_con as sup_con
    from layerlens.training.run_folder import read_metrics as read_metrics
    from layerlens.trajectory import Trajectory as Trajectory
    from layerlens.trajectory import evaluate_run as evaluate_run
    from layerlens.trajectory import finetune as finetune

_HOMES = {
    "activations": ("capture", "features"),
    "analysis.cka": ("StreamingCKA",),
    "analysis.dimension": ("effective_rank", "participation_ratio", "rankme"),
    "analysis.geometry": ("alignment", "diversity", "invariance", "uniformity"),
    "analysis.measures": ("MEASURES",),
    "analysis.neighbours": ("mutual_knn", "two_nn"),
    "analysis.profiles": ("measure_layers",),
    "analysis.regions": ("find_regions",),
    "analysis.resampling": ("difference", "entry_difference"),
    "analysis.results": (
        "Caution",
        "CrossSimilarity",
        "FilmStrip",
        "LayerProfile",
        "SampleInfluence",
        "SimilarityMatrix",
    ),
    "analysis.rsa": ("rsa",),
    "analysis.similarity": ("cka_matrix", "sample_influence", "similarity_matrix"),
    "analysis.subspace": ("mean_cca", "procrustes", "pwcca", "svcca"),
    "analysis.whole_set": ("WholeSetCKA", "cka"),
    "augment.adalase": ("AdaLASE",),
    "augment.deep": ("DeepAugmentation",),
    "augment.dropout": ("TwoPassDropout",),
    "augment.graph_views": ("GraphViews",),
    "augment.spatial": ("cutmix", "cutout", "mixup", "random_erasing", "translate"),
    "augment.transforms": ("remove_principal_components",),
    "augment.views": ("Views", "moco_views", "usual_views", "weak_views"),
    "data": ("Dataset", "dataset_from_arrays", "load_data"),
    "encoders": ("SentenceEncoder", "build_encoder", "train_tokenizer"),
    "errors": ("LayerlensError",),
    "evaluation.graphs": ("graph_scores",),
    "evaluation.knn": ("knn_accuracy",),
    "evaluation.probe": ("linear_probe", "probe_accuracy"),
    "evaluation.sts": ("sts_scores", "text_geometry"),
    "experiments.ablation": ("AdviceOutcome", "FreezeEffect", "advice_outcome", "freeze_effects"),
    "experiments.cost": ("estimate",),
    "experiments.grid": ("make_plan",),
    "experiments.results": ("StudyResult", "collect"),
    "experiments.runner": ("run_plan", "run_study"),
    "experiments.store": ("Store",),
    "experiments.study": ("Study", "make_study", "read_study"),
    "graph_models": ("GraphEncoder", "build_graph_encoder"),
    "graphs": ("GraphDataset", "dataset_from_graphs"),
    "layers": ("discover",),
    "models": ("build_model", "reinitialized"),
    "pipeline": ("Settings", "analyze", "analyze_checkpoint", "analyze_run", "evaluate", "film_strip"),
    "recommendation": ("Recommendation", "advice_over", "recommend", "settled"),
    "report": ("write_report",),
    "text": ("TextDataset",),
    "tokens": ("token_batches",),
    "training.checkpoint": ("load_into",),
    "training.config": ("RunConfig", "make_config"),
    "training.lars": ("LARS",),
    "training.loop": ("train",),
    "training.network": ("load_network",),
    "training.objectives.graphcl": ("graph_cl",),
    "training.objectives.moco": ("info_nce",),
    "training.objectives.simclr": ("nt_xent",),
    "training.objectives.simcse": ("simcse",),
    "training.objectives.supcon": ("sup_con",),
    "training.run_folder": ("read_metrics",),
    "trajectory": ("Trajectory", "evaluate_run", "finetune"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("figures", "study_figures")
__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(f"layerlens.{name}")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"layerlens.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'layerlens' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
