"""The whole path: a checkpoint, or a run with its checkpoints, analysed and turned into a recommendation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from layerlens.activations import features, to_device
from layerlens.analysis.cka import ESTIMATORS
from layerlens.analysis.geometry import alignment, uniformity
from layerlens.analysis.kernels import KERNELS
from layerlens.analysis.measures import parse_measure
from layerlens.analysis.profiles import measure_layers
from layerlens.analysis.resampling import difference
from layerlens.analysis.results import (
    CrossSimilarity,
    Difference,
    FilmStrip,
    Geometry,
    LayerProfile,
    Result,
    SampleInfluence,
    SimilarityMatrix,
)
from layerlens.analysis.similarity import Settle, sample_influence, similarity_matrix
from layerlens.augment.graph_views import GraphViews
from layerlens.augment.views import Views, usual_views
from layerlens.data import SPLITS, AnyDataset, Batches, Dataset, load_data, to_unit
from layerlens.devices import device_of
from layerlens.encoders import SentenceEncoder, same_tokens
from layerlens.errors import ConfigError, DegenerateError, RunFolderError, check_known
from layerlens.evaluation.classifier import classifier_accuracy
from layerlens.evaluation.graphs import graph_scores
from layerlens.evaluation.knn import knn_accuracy
from layerlens.evaluation.probe import PROTOCOLS, linear_probe, probe_accuracy
from layerlens.evaluation.sts import sts_scores, text_geometry
from layerlens.files import read_json, write_json
from layerlens.graphs import GraphBatches, GraphDataset
from layerlens.models import head_name
from layerlens.provenance import provenance
from layerlens.recommendation import Recommendation, recommend
from layerlens.reduction import make_reduction
from layerlens.specs import parse_spec
from layerlens.text import TextDataset
from layerlens.tokens import TokenBatches, token_batches
from layerlens.training.checkpoint import fingerprint
from layerlens.training.config import RunConfig, make_config
from layerlens.training.loop import Progress, load_dev, train
from layerlens.training.network import example_of, load_network
from layerlens.training.run_folder import read_metrics, read_result

T = TypeVar("T")
Watch = Callable[[Iterable[T], str], Iterable[T]]
DEMO = RunConfig(model="resnet18-cifar,width=16", data="digits", epochs=80, batch_size=128, keep_every=10, knn_every=2)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an analysis looks at.

    Attributes:
        layers: A selection, see `layers.select`.
        samples: Images of the split, drawn with `seed`; all if there are fewer.
        batch_size: Images per batch.
        split: `test` or `train`. No labels are used.
        kernel, estimator: Of the CKA, see `cka_matrix`.
        reduce: How maps become rows: `flatten`, `pool` or `positions`, see `reduction.Reduction`. Of graphs `graphs`
            (which `flatten` means there) or `nodes`; the default layers are then those that have nodes.
        memory_mib: Bound for measures over all samples at once.
        level: Confidence of all intervals.
        seed: Of the choice of images, their views, the twin's weights and the resampling.
    """

    layers: str = "auto"
    samples: int = 1000
    batch_size: int = 100
    split: str = "test"
    kernel: str = "linear"
    estimator: str = "minibatch"
    reduce: str = "flatten"
    memory_mib: float = 2048
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 4 or self.batch_size < 4:
            raise ConfigError(f"samples={self.samples}, batch_size={self.batch_size}; allowed: 4 or more")
        check_known("kernel", self.kernel, KERNELS)
        check_known("estimator", self.estimator, ESTIMATORS)
        check_known("split", self.split, SPLITS)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed}; allowed: 0 to 2**63 - 1")
        if not 0 < self.level < 1:
            raise ConfigError(f"level={self.level}; allowed: between 0 and 1")
        if not 0 < self.memory_mib < float("inf"):
            raise ConfigError(f"memory_mib={self.memory_mib}; allowed: above 0")
        make_reduction(self.reduce)

    def on(self, dataset: AnyDataset, network: nn.Module) -> Settings:
        """These settings with what they mean on a kind of data filled in."""
        if not isinstance(dataset, GraphDataset):
            return self
        reduce = "graphs" if self.reduce == "flatten" else self.reduce
        nodes = getattr(network, "node_layers", ()) if reduce == "nodes" and self.layers == "auto" else ()
        return replace(self, reduce=reduce, layers=",".join(nodes) or self.layers)

    @property
    def cka(self) -> str:
        """The measure with its options."""
        return f"cka,kernel={self.kernel},estimator={self.estimator}"


@dataclass(frozen=True, kw_only=True)
class Analysis(Result):
    """One checkpoint, looked at.

    Attributes:
        label: What it is called in figures.
        cka: Similarity of all layers.
        effective_rank: Per layer.
        geometry: Of the embedding, under two random views of each image.
        facts: Checkpoint, model, data, settings and environment.
    """

    label: str
    cka: SimilarityMatrix
    effective_rank: LayerProfile
    geometry: Geometry
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        for name, kind in (("cka", SimilarityMatrix), ("effective_rank", LayerProfile), ("geometry", Geometry)):
            object.__setattr__(self, name, _restored(getattr(self, name), kind))

    def to_frame(self) -> Any:
        """The similarity matrix in long form (a pandas DataFrame)."""
        return self.cka.to_frame().assign(label=self.label)


@dataclass(frozen=True, kw_only=True)
class RunAnalysis(Result):
    """A run from its first checkpoint to its last.

    Attributes:
        name: Of the run folder.
        config: The run's settings.
        metrics: One entry per epoch.
        before, after: The untrained twin (or first checkpoint) and the last one.
        trajectory: Geometry of the embedding at each kept checkpoint.
        scores: Test accuracy of k-NN (k = 200) and linear probe by checkpoint label, or Spearman's correlation of a
            run over sentences with its dev pairs; empty without labels.
        recommendation: From `after`, with `before` as the baseline.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    before: Analysis
    after: Analysis
    trajectory: tuple[Geometry, ...]
    scores: dict[str, dict[str, float]]
    recommendation: Recommendation
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("before", Analysis), ("after", Analysis), ("recommendation", Recommendation)):
            object.__setattr__(self, name, _restored(getattr(self, name), kind))
        object.__setattr__(self, "trajectory", tuple(_restored(g, Geometry) for g in self.trajectory))

    def to_frame(self) -> Any:
        """The recommended targets (a pandas DataFrame)."""
        return self.recommendation.to_frame().assign(run=self.name)


def analyze(
    network: nn.Module,
    dataset: AnyDataset,
    *,
    label: str = "model",
    settings: Settings | None = None,
    facts: dict[str, Any] | None = None,
    watch: Watch[Any] | None = None,
) -> Analysis:
    """CKA with intervals, effective rank and geometry of one network on one data set.

    Args:
        network: Any module that takes the data set's images; it is left as it was.
        dataset: Where the images come from.
        label: What figures call it.
        settings: What to look at.
        facts: Recorded in the result.
        watch: Wraps each loop with its title, for a progress bar.

    Raises:
        UnknownLayerError, NonFiniteError, BatchTooSmallError: As `cka_matrix`.
    """
    chosen, see = (settings or Settings()).on(dataset, network), watch or silent
    batches = batches_of(dataset, chosen, network)
    matrix = similarity_matrix(
        network, see(batches, f"CKA {label}"), chosen.layers, measure=chosen.cka, reduce=chosen.reduce,
        memory_mib=chosen.memory_mib, level=chosen.level, seed=chosen.seed,
    )  # fmt: skip
    assert isinstance(matrix, SimilarityMatrix)
    known = {**(facts or {})}
    if isinstance(batches, TokenBatches):
        known["sentences_cut"] = batches.encoder.too_long(batches.chosen())
    rank = measure_layers(
        network, see(batches, f"rank {label}"), chosen.layers, reduce=chosen.reduce, level=chosen.level
    )
    return Analysis(
        label=label, cka=matrix, effective_rank=rank, geometry=measure_geometry(network, dataset, chosen),
        facts={**known, "settings": vars(chosen), "environment": provenance(device_of(network))},
    )  # fmt: skip


def measure_geometry(
    network: nn.Module,
    dataset: AnyDataset,
    settings: Settings,
    *,
    epoch: int | None = None,
    views: Views | GraphViews | None = None,
) -> Geometry:
    """Alignment and uniformity of the embedding (what goes into the head) under two random views of each sample.

    Both are NaN where an embedding is zero: a network that far collapsed is a finding, not an error. On sentences see
    `text_geometry`: the positive pairs are those that people scored as alike; without scores there is no alignment.
    """
    if isinstance(dataset, TextDataset):
        sentences = [] if dataset.tasks else batches_of(dataset, settings, network).chosen()
        close, spread, count = text_geometry(network, dataset.tasks, sentences)
        return Geometry(alignment=close, uniformity=spread, samples=count, split=settings.split, epoch=epoch)
    batches, see = batches_of(dataset, settings, network), _viewer(dataset, views)
    first, second = (features(network, _Viewed(batches, see, (settings.seed, side))) for side in (0, 1))
    try:
        numbers = alignment(first, second), uniformity(first)
    except DegenerateError:
        numbers = float("nan"), float("nan")
    return Geometry(alignment=numbers[0], uniformity=numbers[1], samples=len(first), split=settings.split, epoch=epoch)


def evaluate(
    network: nn.Module,
    dataset: AnyDataset,
    *,
    layer: str | None = None,
    k: int = 200,
    protocol: str | None = None,
    folds: int = 10,
    splits: int = 1,
    seed: int = 0,
    watch: Watch[Any] | None = None,
) -> dict[str, float]:
    """Offline test accuracy: weighted k-NN (k and 10) and linear probe on frozen features, and the classifier's own.

    Args:
        network: Left as it was.
        dataset: Its whole training split is the bank, its test split the queries.
        layer: Layer name; the embedding by default, see `features`.
        k: Neighbours.
        protocol: Also train a linear classifier by SGD as published, see `probe.PROTOCOLS`.
        folds, splits, seed: Of graphs: of the cross-validation, how often it is repeated, and its seed; see
            `graph_scores`.
        watch: For a progress bar.

    Returns:
        `knn`, `knn10`, `probe` (logistic regression), `linear` with a protocol, and `top1` if the network ends in a
        linear layer with one output per class; in [0, 1]. On scored pairs of sentences the Spearman correlation of
        each task and their `mean`, see `sts_scores`; in [-1, 1]. On graphs `svm` and `probe`, see `graph_scores`.

    Raises:
        ConfigError: The data have no labels, or the sentences no scores.
    """
    if isinstance(dataset, TextDataset):
        return _evaluate_text(network, dataset, layer, protocol)
    if isinstance(dataset, GraphDataset):
        if protocol is not None:
            raise ConfigError(f"protocol={protocol!r} is for images; graphs are scored by cross-validation")
        if dataset.y is None:
            raise ConfigError(f"{dataset.name} has no classes; SVM and logistic regression need one for each graph")
        see = watch or silent
        found = features(network, see(dataset.in_order(), "features"), layer)
        return graph_scores(found, dataset.y, folds=folds, splits=splits, seed=seed, watch=see)
    if k < 1:
        raise ConfigError(f"k={k}; allowed: 1 or more")
    if protocol is not None:
        check_known("protocol", protocol, PROTOCOLS)
    if dataset.y_train is None or dataset.y_test is None:
        raise ConfigError(f"{dataset.name} has no labels; k-NN and linear probe need y_train and y_test")
    see = watch or silent
    bank, queries = (
        features(network, see(dataset.in_order(split), f"features {split}"), layer) for split in ("train", "test")
    )
    scores = {
        name: knn_accuracy(bank, dataset.y_train, queries, dataset.y_test, k=count)
        for name, count in (("knn", k), ("knn10", 10))
    }
    scores["probe"] = probe_accuracy(bank, dataset.y_train, queries, dataset.y_test)
    if protocol is not None:
        scores["linear"] = linear_probe(bank, dataset.y_train, queries, dataset.y_test, **PROTOCOLS[protocol])
    if _classifies(network, dataset):
        batches = see(dataset.in_order("test"), "classifier")
        scores["top1"] = classifier_accuracy(network, batches, dataset.y_test)
    return scores


def analyze_checkpoint(
    checkpoint: str | Path | None,
    dataset: AnyDataset,
    *,
    model: str | None = None,
    settings: Settings | None = None,
    twin: bool = True,
    device: str | torch.device = "cpu",
    folder: Path | None = None,
    watch: Watch[Any] | None = None,
) -> tuple[Analysis, Analysis | None]:
    """Analyse a checkpoint and, with `twin`, the same architecture freshly initialised.

    Args:
        checkpoint: File; None for the model's own weights (a factory may load some).
        dataset: The images.
        model: Specification, where the checkpoint is not layerlens' own.
        settings: What to look at.
        twin: Whether to analyse the untrained twin too.
        device: Where to run.
        folder: Where to keep `analysis.json`; nothing is kept without it.
        watch: For a progress bar.

    Raises:
        RunFolderError: The folder holds the analysis of something else; found out before the work begins.
    """
    chosen = settings or Settings()
    network, metadata = load_network(checkpoint, model=model, dataset=dataset, seed=chosen.seed)
    chosen = chosen.on(dataset, network)
    facts = {
        "checkpoint": Path(checkpoint).name if checkpoint else None,
        "sha256": fingerprint(checkpoint) if checkpoint else None,
        "model": model or metadata.get("model"), "epoch": metadata.get("epoch"), "data": dataset.fingerprint(),
    }  # fmt: skip
    if folder is not None:
        _claim_analysis(folder / "analysis.json", {**facts, "settings": vars(chosen)})
    label = Path(checkpoint).stem if checkpoint else str(facts["model"])
    found = analyze(network.to(device), dataset, label=label, settings=chosen, facts=facts, watch=watch)
    if folder is not None:
        write_json(folder / "analysis.json", found.to_dict())
    if not twin:
        return found, None
    fresh, _ = load_network(checkpoint, model=model, dataset=dataset, untrained=True, seed=chosen.seed)
    twin_facts = {**facts, "checkpoint": None, "sha256": None, "epoch": None}
    return found, analyze(
        fresh.to(device), dataset, label="untrained twin", settings=chosen, facts=twin_facts, watch=watch
    )


def measure_network(
    network: nn.Module,
    dataset: AnyDataset,
    measure: str,
    *,
    settings: Settings | None = None,
    views: Views | GraphViews | None = None,
    groups: int = 10,
    permutations: int = 0,
    tolerance: float | None = None,
    settle: Settle | None = None,
    watch: Watch[Any] | None = None,
) -> SimilarityMatrix | LayerProfile:
    """Any measure of one network on a data set: a matrix for pairs of layers, a profile for single layers.

    Args:
        network: Left as it was.
        dataset: Where the images come from.
        measure: A name of `measures.MEASURES` with its options; `cka` takes kernel and estimator from the settings.
        settings: What to look at.
        views: For alignment, invariance and diversity; the data set's usual ones by default.
        groups, permutations, tolerance, settle: As for `similarity_matrix`.
        watch: For a progress bar.
    """
    chosen, see = (settings or Settings()).on(dataset, network), watch or silent
    found, _ = parse_measure(measure)
    batches = batches_of(dataset, chosen, network)
    common: dict[str, Any] = {
        "reduce": chosen.reduce, "level": chosen.level, "groups": groups, "memory_mib": chosen.memory_mib,
    }  # fmt: skip
    loader = see(batches, found.name)
    if found.over == "pairs":
        asked = _with_settings(measure, chosen)
        matrix = similarity_matrix(
            network, loader, chosen.layers, measure=asked, permutations=permutations, tolerance=tolerance,
            settle=settle, seed=chosen.seed, **common,
        )  # fmt: skip
        assert isinstance(matrix, SimilarityMatrix)
        return matrix
    if permutations or tolerance is not None or settle is not None:
        raise ConfigError(f"{found.name} is a measure of single layers; permutations and tolerance are for pairs")
    view = None if isinstance(dataset, TextDataset) else _view_of(dataset, views, chosen.seed)
    return measure_layers(network, loader, chosen.layers, measure=measure, views=view, **common)


def _with_settings(measure: str, settings: Settings) -> str:
    """A CKA specification with kernel and estimator of the settings, where it does not name its own."""
    found, _ = parse_measure(measure)
    if found.name != "cka":
        return measure
    named = {"kernel": settings.kernel, "estimator": settings.estimator, **parse_spec(measure).options}
    return "cka," + ",".join(f"{key}={value}" for key, value in named.items())


def influence_of_samples(
    network: nn.Module, dataset: AnyDataset, settings: Settings, *, watch: Watch[Any] | None = None
) -> SampleInfluence:
    """How much single images move the CKA matrix; `index` counts within the images that the settings choose."""
    see, settings = watch or silent, settings.on(dataset, network)
    batches = batches_of(dataset, settings, network)
    return sample_influence(
        network, see(batches, "influence"), settings.layers, kernel=settings.kernel, estimator=settings.estimator,
        reduce=settings.reduce, memory_mib=settings.memory_mib,
    )  # fmt: skip


def compare(
    first: nn.Module,
    second: nn.Module,
    dataset: AnyDataset,
    *,
    measure: str = "cka",
    other_layers: str | None = None,
    labels: tuple[str, str] = ("A", "B"),
    settings: Settings | None = None,
    groups: int = 10,
    permutations: int = 0,
    watch: Watch[Any] | None = None,
) -> CrossSimilarity:
    """Each layer of one network against each layer of another, in one pass over the same images.

    Args:
        first, second: Any modules that take the data set's images, of any architectures.
        dataset, settings, watch: As for `measure_network`.
        measure: A name of `measures.MEASURES` over pairs.
        other_layers: A selection for the second network; the settings' one by default.
        labels: What figures call the two.
        groups, permutations: As for `similarity_matrix`.
    """
    given, see = settings or Settings(), watch or silent
    chosen, others = given.on(dataset, first), given.on(dataset, second).layers
    batches = batches_of(dataset, chosen, first, second)
    found = similarity_matrix(
        first, see(batches, "compare"), chosen.layers, other=second, other_layers=other_layers or others,
        measure=_with_settings(measure, chosen), reduce=chosen.reduce, level=chosen.level, groups=groups,
        permutations=permutations, memory_mib=chosen.memory_mib, seed=chosen.seed, labels=labels,
    )  # fmt: skip
    assert isinstance(found, CrossSimilarity)
    return found


def film_strip(
    folder: str | Path,
    *,
    dataset: AnyDataset | None = None,
    model: str | None = None,
    measure: str = "cka",
    settings: Settings | None = None,
    device: str | torch.device = "cpu",
    watch: Watch[Any] | None = None,
) -> FilmStrip:
    """The similarity matrix of each kept checkpoint of a run, on the same images, and what changed in between.

    Args:
        folder: A finished run.
        dataset: Its data, if they moved.
        model: Specification, where the run's model is somebody's factory.
        measure: A name of `measures.MEASURES` over pairs.
        settings: What to look at.
        device: Where to run.
        watch: For a progress bar.

    Raises:
        RunFolderError: No finished run there.
    """
    folder, chosen, see = Path(folder).resolve(), settings or Settings(), watch or silent
    parse_measure(measure, over=("pairs",))
    config, result = read_run_config(folder), read_result(folder)
    data = dataset or load_data(config.data)
    if data.fingerprint() != config.data_sha256:
        raise RunFolderError(f"{str(folder)!r} was trained on other contents of {config.data!r} than are there now")
    labels, frames = [], []
    for name in see(result.checkpoints, "checkpoints"):
        network, metadata = load_network(folder / name, model=model, dataset=data)
        found = measure_network(network.to(device), data, measure, settings=chosen)
        assert isinstance(found, SimilarityMatrix)
        frames.append(found)
        labels.append(f"epoch {metadata['epoch']}" if metadata.get("epoch") is not None else Path(name).stem)
    changes: list[Difference] = []
    if all(len(frame.weights) > 1 for frame in frames):
        changes = [difference(a, b, level=chosen.level) for a, b in pairwise(frames)]
    return FilmStrip(labels=tuple(labels), frames=tuple(frames), changes=tuple(changes))


def analyze_run(
    folder: str | Path,
    *,
    dataset: AnyDataset | None = None,
    model: str | None = None,
    settings: Settings | None = None,
    device: str | torch.device = "cpu",
    watch: Watch[Any] | None = None,
) -> RunAnalysis:
    """Analyse a finished run: before and after, geometry at every checkpoint, scores, recommendation.

    The result is kept in the run's `analysis/run.json` and read from there if the settings are the same.

    Raises:
        RunFolderError: No finished run there.
        DataError: The data are no longer where the run found them.
    """
    folder, chosen, see = Path(folder).resolve(), settings or Settings(), watch or silent
    config = read_run_config(folder)
    kept = folder / "analysis" / "run.json"
    if kept.exists() and (found := _kept_analysis(kept, chosen)) is not None:
        return replace(found, name=folder.name)
    result, metrics = read_result(folder), read_metrics(folder)
    dataset = dataset or load_data(config.data)
    if dataset.fingerprint() != config.data_sha256:
        raise RunFolderError(f"{str(folder)!r} was trained on other contents of {config.data!r} than are there now")
    paths = [folder / name for name in result.checkpoints]
    judged = own_data(config, folder) if config.text is not None and config.text.dev is not None else dataset
    trajectory = []
    for path in see(paths, "geometry"):
        network, metadata = load_network(path, model=model, dataset=dataset)
        network = network.to(device)
        epoch = metadata.get("epoch")
        trajectory.append(measure_geometry(network, judged, chosen, epoch=epoch, views=views_of(config)))
    after, twin = analyze_checkpoint(paths[-1], dataset, model=model, settings=chosen, device=device, watch=see)
    assert twin is not None
    made = RunAnalysis(
        name=folder.name, config=config.model_dump(mode="json"), metrics=metrics, before=twin, after=after,
        trajectory=tuple(trajectory), scores=_scores((paths[0], paths[-1]), judged, model, device, see),
        recommendation=recommend(after.cka, twin.cka, geometry=trajectory[-1], level=chosen.level, seed=chosen.seed),
        settings=vars(chosen),
    )  # fmt: skip
    write_json(kept, made.to_dict())
    return made


def run_folders(paths: Iterable[str | Path]) -> list[Path]:
    """Run folders, each once, all with names of their own.

    Raises:
        RunFolderError: One is no run folder, or two have the same name.
    """
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    for folder in folders:
        read_run_config(folder)
    names = [folder.name for folder in folders]
    if len(set(names)) != len(names):
        raise RunFolderError(f"runs in one report need different folder names; got {names}. Rename one")
    return folders


def views_of(config: RunConfig) -> Views | GraphViews | None:
    """The random views that a run trained on; None for the data's usual ones."""
    if config.graph is not None and config.graph.kinds:
        return GraphViews(**config.graph.model_dump())
    return Views(**config.views.model_dump()) if config.views else None


def own_data(config: RunConfig, folder: str | Path) -> AnyDataset:
    """What a run is scored on: its data, or its dev pairs of sentences.

    Raises:
        RunFolderError: Other contents are there now.
        ConfigError: Sentences without scores.
    """
    text = config.text
    if text is not None and text.dev is None:
        raise ConfigError(f"{str(folder)!r} has no scored pairs of sentences of its own; give --data sts:PATH")
    data = load_data(config.data) if text is None else load_dev(str(text.dev))
    if data.fingerprint() != (config.data_sha256 if text is None else text.dev_sha256):
        place = config.data if text is None else text.dev
        raise RunFolderError(f"{str(folder)!r} was trained on other contents of {place!r} than are there now")
    return data


def read_run_config(folder: str | Path) -> RunConfig:
    """The configuration of a run folder.

    Raises:
        RunFolderError: It is no run folder.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise RunFolderError(f"{str(folder)!r} is no run folder: it has no config.json. `layerlens train` makes one")
    content = read_json(path)
    if not isinstance(content.get("config"), dict):
        raise RunFolderError(f"{str(path)!r} is damaged; train again in a new folder")
    return make_config(content["config"])


def demo(
    folder: str | Path = "demo", *, progress: Callable[[Progress], None] | None = None, watch: Watch[Any] | None = None
) -> RunAnalysis:
    """The main job: SimCLR on handwritten digits, from random weights to a recommendation.

    Interrupted, it goes on where it stopped; finished, it reads what it has. `report.write_report` shows it.
    """
    dataset = load_data(DEMO.data)
    run = Path(folder) / "simclr-digits"
    train(DEMO, run, dataset=dataset, device="cpu", progress=progress)
    return analyze_run(run, dataset=dataset, settings=Settings(samples=360, batch_size=36), watch=watch)


def batches_of(dataset: AnyDataset, settings: Settings, *networks: nn.Module) -> Any:
    """What the settings choose of a data set, in batches that all of the networks can run.

    Raises:
        ConfigError: Networks that cut sentences into other tokens each.
    """
    chosen = {"samples": settings.samples, "batch_size": settings.batch_size, "seed": settings.seed}
    if isinstance(dataset, Dataset | GraphDataset):
        return dataset.batches(settings.split, **chosen)
    encoders = [network for network in networks if isinstance(network, SentenceEncoder)]
    if len(encoders) < len(networks):
        raise ConfigError(f"{dataset.name} holds sentences, which only models hf:PATH and their checkpoints read")
    if any(other.max_length != encoders[0].max_length for other in encoders):
        lengths = " and ".join(str(encoder.max_length) for encoder in encoders)
        raise ConfigError(f"the two models read max_length {lengths} tokens; add ,max_length= to make them agree")
    if any(not same_tokens(encoders[0], other) for other in encoders[1:]):
        raise ConfigError("the two models cut sentences into different tokens, so no batch fits both")
    return token_batches(encoders[0], dataset, settings.split, **chosen)


def embedding_name(network: nn.Module, dataset: AnyDataset) -> str:
    """What `features` means by the embedding of a network, in words."""
    head = head_name(network, to_device(example_of(network, dataset), device_of(network)))
    return f"input of {head}" if head else "output"


def _view_of(dataset: Dataset | GraphDataset, views: Views | GraphViews | None, seed: int) -> Callable[[Any], Any]:
    """A function from a batch as networks see it to a random view of it; the same views in every run."""
    generator, viewer = torch.Generator().manual_seed(seed), _viewer(dataset, views)
    if isinstance(dataset, GraphDataset):
        device = lambda batch: next(iter(batch.values())).device  # noqa: E731
        return lambda batch: to_device(viewer(to_device(batch, torch.device("cpu")), generator), device(batch))
    mean = torch.tensor(dataset.mean).view(-1, 1, 1)
    std = torch.tensor(dataset.std).view(-1, 1, 1)
    return lambda images: viewer((images.cpu() * std + mean).clamp(0, 1), generator).to(images.device)


def _viewer(dataset: Dataset | GraphDataset, views: Views | GraphViews | None) -> Callable[[Any, torch.Generator], Any]:
    """A function from images in [0, 1], or from a batch of graphs, to what networks see of a random view."""
    if isinstance(dataset, GraphDataset):
        return views or GraphViews()
    chosen: Callable[[Any, torch.Generator], Any] = views or usual_views(flip=dataset.flip)
    return lambda images, generator: dataset.normalize(chosen(images, generator))


class _Viewed:
    """The samples of some batches under one random view each, the same at every iteration."""

    def __init__(
        self, batches: Batches | GraphBatches, see: Callable[[Any, torch.Generator], Any], seed: tuple[int, int]
    ) -> None:
        self.batches, self.see, self.seed = batches, see, seed

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(2 * self.seed[0] + self.seed[1] + 1)
        for rows in self.batches.order.tensor_split(len(self.batches)):
            batches = self.batches
            shown = batches.graphs.pick(rows) if isinstance(batches, GraphBatches) else to_unit(batches.images[rows])
            yield self.see(shown, generator)


def _evaluate_text(
    network: nn.Module, dataset: TextDataset, layer: str | None, protocol: str | None
) -> dict[str, float]:
    if layer is not None or protocol is not None:
        raise ConfigError("layer and protocol are for images; sentences are scored by the encoder's own embedding")
    if few := [task.name for task in dataset.tasks if len(task.scores) < 2]:
        raise ConfigError(f"{few[0]} of {dataset.name} is a single pair, which can't be ranked; give two or more")
    try:
        return sts_scores(network, dataset.tasks)
    except DegenerateError:  # collapsed: a finding, no error
        return dict.fromkeys((*(task.name for task in dataset.tasks), "mean"), float("nan"))


def _classifies(network: nn.Module, dataset: Dataset) -> bool:
    """Whether the network ends in a linear classifier for this data set's classes."""
    head = network.get_submodule(head_name(network, torch.zeros(2, *dataset.input_shape, device=device_of(network))))
    return isinstance(head, nn.Linear) and head.out_features == len(dataset.classes)


def _scores(
    paths: Iterable[Path], dataset: AnyDataset, model: str | None, device: str | torch.device, see: Watch[Any]
) -> dict[str, dict[str, float]]:
    scored = bool(dataset.tasks) if isinstance(dataset, TextDataset) else dataset.y_train is not None
    if not scored or (isinstance(dataset, Dataset) and dataset.y_test is None):
        return {}
    networks = {path.stem: load_network(path, model=model, dataset=dataset)[0] for path in paths}
    return {label: evaluate(network.to(device), dataset, watch=see) for label, network in networks.items()}


def _claim_analysis(path: Path, facts: dict[str, Any]) -> None:
    """See that a folder has no analysis of something else."""
    kept = read_json(path).get("facts") if path.exists() else facts
    if not isinstance(kept, dict):
        raise RunFolderError(f"{str(path)!r} is damaged; delete it, or choose another --out")
    for key in ("sha256", "model", "data", "settings"):
        if kept.get(key) != facts[key]:
            raise RunFolderError(f"{str(path.parent)!r} holds an analysis with other {key}; choose another --out")


def _kept_analysis(path: Path, settings: Settings) -> RunAnalysis | None:
    content = read_json(path)
    return RunAnalysis.from_dict(content) if content.get("settings") == vars(settings) else None


def _restored(value: Any, kind: type[Result]) -> Any:
    """A nested result as an object again after a trip through JSON."""
    if not isinstance(value, dict):
        return value
    return kind(**{key: item for key, item in value.items() if key not in ("type", "schema")})


def silent(items: Iterable[T], _title: str) -> Iterable[T]:
    """No progress bar."""
    return items
