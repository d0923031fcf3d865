"""A study becomes a list of runs, each with the key that names its folder wherever it is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from layerlens.data import AnyDataset, Dataset, load_data
from layerlens.errors import ConfigError, LayerlensError, check_known
from layerlens.evaluation.probe import PROTOCOLS
from layerlens.experiments.study import WORDS, Arm, Axes, Measure, Study, axis_name
from layerlens.graphs import GraphDataset
from layerlens.layers import INPUT, discover
from layerlens.training.config import RunConfig, make_config, overlay
from layerlens.training.loop import check_run, resolve
from layerlens.training.network import adalase_layers, build_network, example_of
from layerlens.training.order import Order

Load = Callable[[str], AnyDataset]
HARMLESS = (
    "seed",
    "epochs",
    "learning_rate",
    "momentum",
    "nesterov",
    "weight_decay",
    "warmup_epochs",
    "warmup_from",
    "temperature",
    "loss_scale",
    "knn_every",
    "keep_every",
)  # settings that never keep a run from beginning
MEASURED_SCHEMA = 1  # of what `measuring` does; another number measures everything anew
IMAGES = ("train_samples", "holdout", "batch_size")  # and these only where there are too few images


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One thing that is measured at each kept checkpoint of a run.

    Attributes:
        kind: `scores`, `last-scores` (of the last checkpoint alone) or `cka`.
        data: Specification of the data; None for the run's own.
        file: Where it is kept, within the run's folder; the name changes with the settings and with the data.
    """

    kind: str
    data: str | None
    file: str


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        key: Sixteen hexadecimal digits that name its folder: the hash of the configuration, with the contents of its
            data, and of the run that it starts from.
        arm: Whose it is; the name of a start for a run that arms start from.
        baseline: Whether the others are compared with it.
        start: Key of the run from whose last checkpoint it starts.
        values: Short name of each axis -> value.
        seed: Of the run.
        config: What `train` gets; `init` is filled in when the run starts.
        measured: What is measured afterwards.
    """

    key: str
    arm: str
    baseline: bool
    start: str | None
    values: dict[str, Any]
    seed: int
    config: RunConfig
    measured: tuple[Measured, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Where what is measured is kept, within the run's folder."""
        return tuple(m.file for m in self.measured)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every run of a study; two rows with the same key are one run, done once.

    Attributes:
        study: What was planned.
        runs: Starts first, then arm by arm.
    """

    study: Study
    runs: tuple[PlannedRun, ...]
    datasets: dict[str, AnyDataset] = field(default_factory=dict, repr=False, compare=False)

    @property
    def distinct(self) -> dict[str, PlannedRun]:
        """One row of each key, with everything that any of its rows wants measured."""
        found: dict[str, PlannedRun] = {}
        for run in self.runs:
            known = found.get(run.key)
            if known is not None and set(run.measured) - set(known.measured):
                found[run.key] = replace(known, measured=tuple(dict.fromkeys((*known.measured, *run.measured))))
            elif known is None:
                found[run.key] = run
        return found


def make_plan(study: Study, *, load: Load | None = None) -> Plan:
    """Expand a study into its runs.

    Args:
        study: At the scale that is meant.
        load: How to load data; `load_data` by default.

    Raises:
        ConfigError: A combination that `RunConfig` refuses, or no run at all; it names the arm and the values.
        DataError: Data are missing.
    """
    if study.measure.protocol is not None:
        check_known("protocol", study.measure.protocol, PROTOCOLS)
    planner = _Planner(study, load or load_data)
    runs = (*planner.starts(), *(run for arm in study.arms for run in planner.arm(arm)))
    return Plan(study=study, runs=runs, datasets=planner.datasets)


class _Planner:
    def __init__(self, study: Study, load: Load) -> None:
        self.study, self.load = study, load
        self.datasets: dict[str, AnyDataset] = {}
        self.checked: set[str] = set()
        self.models: dict[str, str] = {}  # of starts, by key
        self.layers: dict[tuple[str, str, str, str], list[str]] = {}
        self.started: dict[tuple[str, int, str], str] = {}  # (start, seed, shared values) -> key

    def starts(self) -> Iterator[PlannedRun]:
        """The runs that arms start from, for each seed and each value of the shared axes."""
        used = {arm.start for arm in self.study.arms}
        for name, settings in self.study.starts.items():
            if name not in used:
                continue
            base = overlay(self.study.base, settings)
            for shared, seed in product(self._values(base, self.study.axes, name), self.study.seed_list):
                run = self._run(name, base, shared, seed)
                self.started[name, seed, _text(shared)] = run.key
                self.models[run.key] = run.config.model
                yield run

    def arm(self, arm: Arm) -> Iterator[PlannedRun]:
        """The runs of one arm."""
        base = overlay(self.study.base, arm.settings)
        for shared in self._values(base, self.study.axes, arm.name):
            for own in self._values(_at(base, shared), arm.axes, arm.name):
                for seed in self.study.seed_list:
                    yield self._from_start(arm, base, shared, own, seed)

    def _from_start(
        self, arm: Arm, base: dict[str, Any], shared: dict[str, Any], own: dict[str, Any], seed: int
    ) -> PlannedRun:
        start = self._start(arm, shared, seed)
        run = self._run(arm.name, base, {**shared, **own}, seed, start=start, arm=arm)
        if start is not None and self.models[start] != run.config.model:
            raise ConfigError(
                f"{self.study.name}, {arm.name}: model={run.config.model!r}, but its start {arm.start!r} has "
                f"{self.models[start]!r}; allowed: the same"
            )
        return run

    def _start(self, arm: Arm, shared: dict[str, Any], seed: int) -> str | None:
        """Key of the run that an arm's run starts from."""
        if arm.start is None:
            return None
        key = self.started.get((arm.start, seed, _text(shared)))
        if key is None:
            where = f"{self.study.name}, {_label(arm.name, shared)}"
            raise ConfigError(
                f"{where}: the start {arm.start!r} has no run with these values, as its network has other layers; list "
                "the values of the axis"
            )
        return key

    def _run(
        self, name: str, base: dict[str, Any], values: dict[str, Any], seed: int, start: str | None = None,
        arm: Arm | None = None,
    ) -> PlannedRun:  # fmt: skip
        try:
            config = make_config({**_at(base, values), "seed": seed})
            dataset = self._dataset(config.data)
            resolved = resolve(config, dataset)
            self._check(resolved, dataset)
        except LayerlensError as error:
            raise type(error)(f"{self.study.name}, {_label(name, values)}: {error}") from error
        identity = resolved.identity()
        return PlannedRun(
            key=identity if start is None else hashlib.sha256(f"{identity} from {start}".encode()).hexdigest()[:16],
            arm=name, baseline=bool(arm and arm.baseline), start=start,
            values={axis_name(axis): value for axis, value in values.items()}, seed=seed, config=resolved,
            measured=tuple(self._measured(resolved, arm)),
        )  # fmt: skip

    def _check(self, config: RunConfig, dataset: AnyDataset) -> None:
        """See that such a run can begin; once for all runs that differ in numbers that can't hinder it."""
        plain = config.model_copy(update={**dict.fromkeys(HARMLESS), "augment": _where(config)})
        images, network = repr(plain), repr(plain.model_copy(update=dict.fromkeys(IMAGES)))
        if images not in self.checked:
            Order(config, dataset)
        if network not in self.checked:
            check_run(config, dataset)
        self.checked |= {images, network}

    def _measured(self, config: RunConfig, arm: Arm | None) -> Iterator[Measured]:
        measure = self.study.measure
        whole = measure.untrained == "all" or (arm is not None and arm.baseline)
        scores = "scores" if whole else "last-scores"
        if measure.cka:
            yield _measured("cka", None, str(config.data_sha256), measure)
        if measure.scores and config.text is None:
            yield _measured(scores, None, str(config.data_sha256), measure)
        elif measure.scores and config.text is not None and config.text.dev is not None:
            yield _measured(scores, None, str(config.text.dev_sha256), measure)
        for data in arm.transfer if arm is not None else ():
            self._check_transfer(config, data)
            yield _measured(scores, data, self._dataset(data).fingerprint(), measure)

    def _check_transfer(self, config: RunConfig, data: str) -> None:
        """See that a network can be scored on other data."""
        other, own = self._dataset(data), self._dataset(config.data)
        if isinstance(own, GraphDataset) or isinstance(other, GraphDataset):
            if (
                not (isinstance(own, GraphDataset) and isinstance(other, GraphDataset))
                or own.features != other.features
            ):
                raise ConfigError(
                    f"{self.study.name}: transfer from {config.data!r} to {data!r}; allowed: from graphs to graphs "
                    "with as many features per node"
                )
            return
        if not isinstance(other, Dataset) or not isinstance(own, Dataset):
            if isinstance(own, Dataset) or isinstance(other, Dataset) or not other.tasks:
                raise ConfigError(
                    f"{self.study.name}: transfer from {config.data!r} to {data!r}; allowed: from images to images, "
                    "and from sentences to scored pairs, sts:PATH"
                )
            return
        if other.y_train is None or other.y_test is None:
            raise ConfigError(f"{self.study.name}: transfer to {data!r}, which has no labels to score")
        if other.input_shape != own.input_shape:
            raise ConfigError(
                f"{self.study.name}: transfer from {config.data!r} with images {own.input_shape} to {data!r} with "
                f"{other.input_shape}; allowed: images of the same shape"
            )

    def _values(self, base: dict[str, Any], axes: Axes, arm: str) -> Iterator[dict[str, Any]]:
        """Every combination of the axes' values."""
        lists = []
        for axis, values in axes.items():
            lists.append(self._layers(base, axis, values, arm) if isinstance(values, str) else values)
        for combination in product(*lists):
            yield dict(zip(axes, combination, strict=True))

    def _layers(self, base: dict[str, Any], axis: str, words: str, arm: str) -> list[str]:
        """The layers that words such as `each layer` mean in the network of an arm."""
        try:
            return self._find_layers(base, axis, words)
        except LayerlensError as error:
            raise type(error)(f"{self.study.name}, {arm}: {error}") from error

    def _find_layers(self, base: dict[str, Any], axis: str, words: str) -> list[str]:
        with_input, with_last = WORDS[words]
        trial = overlay(base, {axis.partition(".")[0]: {}})
        config = make_config({k: v for k, v in trial.items() if k not in ("augment", "freeze")})
        kinds = str(config.adalase.kinds) if config.adalase is not None and axis == "adalase.layers" else ""
        sought = (config.model, config.data, config.objective, f"{kinds} {config.text}")
        if sought not in self.layers:
            dataset = self._dataset(config.data)
            network = build_network(config, dataset)
            example = example_of(network, dataset)
            if kinds:
                self.layers[sought] = adalase_layers(config, network, example)
            else:
                self.layers[sought] = [f.name for f in discover(network, example) if f.index is not None]
        names = self.layers[sought]
        chosen = [name for name in names if (with_input or name != INPUT) and (with_last or kinds or name != names[-1])]
        if not chosen:
            raise ConfigError(f"{words!r} of {config.model!r} are none; name the layers")
        return chosen

    def _dataset(self, spec: str) -> AnyDataset:
        if spec not in self.datasets:
            self.datasets[spec] = self.load(spec)
        return self.datasets[spec]


def _where(config: RunConfig) -> Any:
    """[augment] without its numbers."""
    return config.augment and config.augment.model_copy(update={"rate": 0.0, "fraction": 0.0, "stop_gradient": False})


def _at(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings with each axis at its value."""
    made = base
    for axis, value in values.items():
        table, _, name = axis.rpartition(".")
        made = overlay(made, {table: {name: value}} if table else {name: value})
    return made


def _measured(kind: str, data: str | None, data_sha256: str, measure: Measure) -> Measured:
    names = ("samples", "batch_size") if kind == "cka" else ("k", "protocol", "samples", "batch_size")
    settings = {name: getattr(measure, name) for name in names}
    content = [MEASURED_SCHEMA, kind, data_sha256, settings]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Measured(kind=kind, data=data, file=f"analysis/study-{kind}-{digest[:12]}.json")


def _label(arm: str, values: dict[str, Any]) -> str:
    return ", ".join([arm, *(f"{axis_name(axis)}={value!r}" for axis, value in values.items())])


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
