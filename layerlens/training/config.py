"""Run configurations: every number that decides a run's result, checked, with its unit."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError, field_validator, model_validator

from layerlens.augment.adalase import MIXING
from layerlens.errors import ConfigError, closest

SCHEMA = 2
TEXT_OBJECTIVES = ("simcse", "pairs", "mlm")
GRAPH_OBJECTIVES = ("graphcl",)
TEMPERATURES = {
    "simclr": 0.5, "supcon": 0.5, "moco": 0.2, "supervised": 1.0, "simcse": 0.05, "pairs": 0.05, "mlm": 1.0,
    "graphcl": 0.2,
}  # fmt: skip
_TEXT = {
    "optimizer": "adamw",
    "schedule": "linear",
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
    "clip": 1.0,
    "epochs": 1,
    "batch_size": 64,
    "learning_rate": 3e-5,
    "channels_last": False,
}  # fmt: skip - the protocol of SimCSE, arXiv:2104.08821
_GRAPHS = {
    "model": "gin",
    "optimizer": "adamw",
    "schedule": "constant",
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
    "epochs": 20,
    "batch_size": 128,
    "learning_rate": 0.01,
    "projection": 160,
    "holdout": 0.0,
    "channels_last": False,
}  # fmt: skip - the protocol of GraphCL, arXiv:2010.13902; without decay AdamW is Adam
LATER = {  # came later; so, nothing changed
    "schedule": "cosine", "clip": None, "text": None, "epoch_samples": None, "graph": None,
}  # fmt: skip
Probability = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AugmentConfig(_Strict):
    """Deep Augmentation of one run; the meaning of each field is that of `DeepAugmentation`.

    `layer` is a selection: a name, several with commas, globs, or `all` (every default layer).
    """

    layer: str
    transform: Literal["dropout", "channel-dropout", "position-dropout", "noise", "pca"] = "dropout"
    rate: float = Field(0.5, ge=0, le=1, description="dropout rate, a probability; of noise, its relative deviation")
    fraction: float = Field(0.5, ge=0, le=1, description="share of the samples, a probability")
    stop_gradient: bool = False
    components: int = Field(1, ge=-6, le=6, description="principal components removed by pca")
    per_token: bool = Field(False, description="pca over positions instead of samples")
    pairs: Literal["independent", "one"] = Field("independent", description="one: exactly one view of each pair")

    @field_validator("components")
    @classmethod
    def _not_none(cls, value: int) -> int:
        if value == 0:
            raise ValueError("allowed: 1 to 6 (first ones) or -6 to -1 (last ones)")
        return value


class FreezeConfig(_Strict):
    """What does not learn: the parameters and batch-norm statistics before (up to and with) a layer, or after it."""

    part: Literal["before", "after"]
    layer: str | None = Field(None, description="the layer of [augment] if left out")


class AdaLASEConfig(_Strict):
    """Adaptive layer ratios; the meaning of each field is that of `AdaLASE`.

    `layers` is a selection, or `auto`: the input and every default layer that the kinds can augment.
    """

    layers: str = "auto"
    kinds: tuple[
        Literal[
            "mixup", "cutmix", "cutout", "translation", "dropout", "channel-dropout", "position-dropout", "noise"
        ], ...,
    ] = ("cutout",)  # fmt: skip
    eta: float = Field(0.1, gt=0, description="step size of the ratios")
    floor: float = Field(0.1, gt=0, le=1, description="smallest ratio times the number of ratios")
    interval: int = Field(10, ge=1, description="steps between two updates")
    ratios: Literal["adaptive", "uniform"] | tuple[NonNegativeFloat, ...] = "adaptive"
    rotation: float = Field(10.0, ge=0, description="degrees, of the pseudo-validation images")

    @field_validator("ratios", mode="before")
    @classmethod
    def _words_or_numbers(cls, value: Any) -> Any:
        numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) and v >= 0 for v in value)
        if value not in ("adaptive", "uniform") and not (numbers and len(value)):
            words = closest(value if isinstance(value, str) else "", ("adaptive", "uniform"))
            raise ValueError(f"{words}, or a list of numbers from 0, one per layer and kind")
        return value


class DropoutConfig(_Strict):
    """Dropout in its two passes; the meaning of each field is that of `TwoPassDropout`."""

    kind: Literal["standard", "forward", "backward", "augmented"] = "standard"
    rate: float = Field(0.5, ge=0, lt=1, description="probability, forward (or in the one pass that has dropout)")
    backward_rate: float | None = Field(None, ge=0, lt=1, description="probability, backward, of augmented dropout")
    layers: str = Field("auto", description="Linear and Conv modules whose input is dropped, with commas")


class MoCoConfig(_Strict):
    """Momentum contrast; queues of labelled and unlabelled keys are split like the batch."""

    queue: int | None = Field(None, ge=1, description="keys; 65,536, or half of the images if that is less")
    key_momentum: float = Field(0.999, ge=0, le=1, description="share of the key network that stays, per step")
    bn_splits: int = Field(1, ge=1, description="groups with batch-norm statistics of their own, as on that many GPUs")


class TextConfig(_Strict):
    """Sentences and their encoder; the meaning of pooling and head is that of `SentenceEncoder`."""

    pooling: Literal["cls", "cls-before-head", "mean", "first-last-mean"] | None = Field(
        None, description="the model's own if left out, else cls-before-head"
    )
    max_length: int | None = Field(None, ge=4, description="tokens read of a sentence; the model's own, else 32")
    model_dropout: float | None = Field(None, ge=0, lt=1, description="every dropout of the model; its own if left out")
    mlm_weight: float = Field(0.0, ge=0, description="factor on the masked-LM loss beside simcse; 0.1 in SimCSE")
    mlm_share: float = Field(0.15, gt=0, lt=1, description="share of the tokens that the masked-LM loss asks for")
    dev: str | None = Field(None, description="sts:PATH whose Spearman correlation is logged; the best is kept")
    dev_every: int | None = Field(None, ge=1, description="steps between two looks at dev; each epoch if left out")
    dev_sha256: str | None = Field(None, description="fingerprint of dev; filled in by `train`")
    model_sha256: str | None = Field(None, description="fingerprint of the model's files; filled in by `train`")


class GraphConfig(_Strict):
    """Random views of graphs; the meaning of each field is that of `GraphViews`."""

    kinds: tuple[Literal["node-drop", "edge-perturb", "feature-mask", "subgraph"], ...] = Field(
        ("node-drop", "subgraph"), description="each graph's is drawn from these; none for the graphs as they are"
    )
    ratio: float = Field(0.1, ge=0, lt=1, description="share of nodes or edges left out, exchanged or masked")
    keep: float = Field(0.2, gt=0, le=1, description="share of the nodes that a subgraph keeps")


class ViewsConfig(_Strict):
    """Random views of one run; the meaning of each field is that of `Views`."""

    scale: float = Field(0.2, gt=0, le=1, description="smallest crop, share of the image's area")
    ratio: float = Field(4 / 3, ge=1, description="largest aspect ratio of a crop")
    flip: Probability = Field(0.5, description="probability")
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Annotated[float, Field(ge=0, le=0.5)]] = (
        0.4, 0.4, 0.4, 0.1,
    )  # fmt: skip
    jitter_p: Probability = Field(0.8, description="probability")
    grey: Probability = Field(0.2, description="probability")
    blur: Probability = Field(0.0, description="probability")
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.1, 2.0), description="pixels"
    )
    rotation: float = Field(0.0, ge=0, le=180, description="degrees")
    shift: int = Field(0, ge=0, description="pixels")


class RunConfig(_Strict):
    """One training run. Two runs with equal configurations are the same run.

    `learning_rate` is the peak, reached after `warmup_epochs`; None means 0.06 · batch_size / 128. `temperature` None
    means the objective's usual one (0.2 MoCo, 0.05 for sentences, else 0.5), `labels` None 0 for MoCo and 1 otherwise.
    `views` None means the objective's usual ones on this data; `train` writes down what that was. With an objective
    for sentences (simcse, pairs, mlm) the defaults are SimCSE's: AdamW at 3e-5 with linear decay, gradients clipped at
    norm 1, one epoch in batches of 64. With graphcl they are GraphCL's: Adam at 0.01, 20 epochs in batches of 128.
    """

    objective: Literal["simclr", "supcon", "moco", "supervised", "simcse", "pairs", "mlm", "graphcl"] = "simclr"
    model: str = "resnet18-cifar"
    data: str = "digits"
    seed: int = Field(0, ge=0, lt=2**63)
    epochs: int = Field(100, ge=1, description="passes over the training split")
    batch_size: int = Field(256, ge=4, description="images per step, over all ranks; contrastive: twice as many views")
    accumulate: int = Field(1, ge=1, description="parts of a batch whose gradients are added before the step")
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="decay after the warm-up")
    clip: float | None = Field(None, ge=0, description="largest norm of the gradient; 0 for no bound")
    learning_rate: float | None = Field(None, gt=0, description="per step, at its peak")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0, description="L2 factor")
    warmup_epochs: float = Field(5.0, ge=0, description="epochs of linear warm-up, at most a tenth of all")
    warmup_from: float = Field(0.0, ge=0, description="learning rate at the start of the warm-up")
    temperature: float | None = Field(None, gt=0, description="T of the contrastive losses")
    loss_scale: float = Field(1.0, gt=0, description="factor on the loss; the paper's code base has T / 0.07")
    projection: int = Field(128, ge=2, description="outputs of the projection head")
    labels: Probability | None = Field(None, description="share of training images whose labels supcon and moco see")
    train_samples: int | None = Field(None, ge=4, description="images trained on; all by default")
    epoch_samples: int | None = Field(None, ge=4, description="samples of an epoch; the whole split if left out")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the training split kept for the online k-NN")
    knn_every: int = Field(1, ge=1, description="epochs between two online k-NN scores")
    keep_every: int = Field(10, ge=1, description="epochs between two kept checkpoints; first and last are kept too")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    channels_last: bool = True
    compile: bool = False
    devices: int = Field(1, ge=1, description="processes, one per GPU, or on the CPU")
    views: ViewsConfig | None = None
    input_augment: Literal["none", "erasing", "cutout", "mixup", "cutmix"] = "none"
    augment: AugmentConfig | None = None
    freeze: FreezeConfig | None = None
    adalase: AdaLASEConfig | None = None
    dropout: DropoutConfig | None = None
    moco: MoCoConfig | None = None
    text: TextConfig | None = None
    graph: GraphConfig | None = None
    init: str | None = Field(None, description="checkpoint whose weights the run starts from")
    init_sha256: str | None = Field(None, description="fingerprint of that file; filled in by `train`")
    data_sha256: str | None = Field(None, description="fingerprint of the data; filled in by `train`")

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, given: Any) -> Any:
        """Defaults that are others for sentences and graphs than for images."""
        kind = given.get("objective") if isinstance(given, dict) else None
        if kind not in (*TEXT_OBJECTIVES, *GRAPH_OBJECTIVES):
            return given
        usual = {**_TEXT, "text": {}} if kind in TEXT_OBJECTIVES else {**_GRAPHS, "graph": {}}
        return {**usual, **{key: value for key, value in given.items() if value is not None or key not in usual}}

    @model_validator(mode="after")
    def _fill_in(self) -> RunConfig:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 0.06 * self.batch_size / 128)
        if self.temperature is None:
            object.__setattr__(self, "temperature", TEMPERATURES[self.objective])
        if self.labels is None:
            object.__setattr__(self, "labels", 0.0 if self.objective == "moco" else 1.0)
        if self.objective == "moco" and self.moco is None:
            object.__setattr__(self, "moco", MoCoConfig())
        for problem in self._problems():
            raise ValueError(problem)
        return self

    @property
    def samples(self) -> str:
        """What the objective learns from, in words."""
        return "sentences" if self.reads_text else "graphs" if self.reads_graphs else "images"

    @property
    def part(self) -> int:
        """Images in one forward pass of one rank."""
        return self.batch_size // (self.accumulate * self.devices)

    @property
    def labelled_per_part(self) -> int:
        """Labelled images in each forward pass of MoCo: a batch is split like the data."""
        return round(self.part * (self.labels or 0.0)) if self.objective == "moco" else 0

    @property
    def reads_text(self) -> bool:
        """Whether the objective is one for sentences."""
        return self.objective in TEXT_OBJECTIVES

    @property
    def reads_graphs(self) -> bool:
        """Whether the objective is one for graphs."""
        return self.objective in GRAPH_OBJECTIVES

    def _problems(self) -> Iterator[str]:
        """What each field allows but not together; says what to do."""
        if self.reads_text:
            yield from self._text_problems()
        elif self.text is not None:
            yield f"[text] with objective={self.objective!r}; leave it out or use {', '.join(TEXT_OBJECTIVES)}"
        if self.reads_graphs:
            yield from self._graph_problems()
        elif self.graph is not None:
            yield f"[graph] with objective={self.objective!r}; leave it out or use {', '.join(GRAPH_OBJECTIVES)}"
        mixes = self.input_augment in MIXING
        if self.batch_size % (self.accumulate * self.devices) or self.part < 2:
            yield (
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} × devices="
                f"{self.devices} parts of 2 {self.samples} or more; choose a multiple"
            )
        if self.moco is not None and self.objective != "moco":
            yield f"[moco] with objective={self.objective!r}; leave it out or use objective='moco'"
        if self.moco is not None and self.moco.queue and self.moco.queue % (self.batch_size // self.accumulate):
            yield (
                f"moco.queue={self.moco.queue} is not a multiple of the {self.batch_size // self.accumulate} keys of "
                f"a step; try {self._near_queue()}"
            )
        if self.moco is not None and self.part % self.moco.bn_splits:
            yield f"moco.bn_splits={self.moco.bn_splits} does not divide the {self.part} images of a pass"
        if self.moco is not None and self.part // self.moco.bn_splits < 2:
            yield f"moco.bn_splits={self.moco.bn_splits} leaves one of {self.part} images to a group; use fewer"
        if self.objective == "moco" and 0 < (self.labels or 0) < 1 and self.labelled_per_part in (0, self.part):
            yield (
                f"labels={self.labels} of {self.part} images in a pass are {self.labelled_per_part}; MoCo needs at "
                "least one of each kind: use a larger batch, or 0 or 1"
            )
        if self.objective == "supervised" and self.labels != 1:
            yield f"labels={self.labels} with supervised training, which has no use for other images; set train_samples"
        if self.objective == "simclr" and self.labels not in (0, 1):
            yield f"labels={self.labels} with simclr, which sees no labels; leave it out"
        if self.objective == "supervised" and self.temperature != 1:
            yield f"temperature={self.temperature} with supervised training, which has none; leave it out"
        if self.warmup_from > (self.learning_rate or 0):
            yield f"warmup_from={self.warmup_from} above learning_rate={self.learning_rate}; a warm-up rises"
        if mixes and self.objective not in ("moco", "supervised"):
            yield f"input_augment={self.input_augment!r} mixes images; only moco and supervised have a mixed loss"
        if self.nesterov and self.momentum == 0:
            yield "nesterov=true needs momentum above 0"
        if self.freeze is not None and self.freeze.layer is None and self.augment is None:
            yield "[freeze] needs layer = …, or an [augment] whose layer it takes"
        if self.augment is not None and self.augment.pairs == "one":
            if self.objective in ("moco", "supervised"):
                yield f"augment.pairs='one' needs both views in one network; {self.objective} has none"
            if self.augment.fraction != 0.5:
                yield f"augment.pairs='one' with fraction={self.augment.fraction}; half of the views are transformed"
        if self.adalase is not None:
            yield from self._adalase_problems(self.adalase)

    def _image_problems(self) -> Iterator[str]:
        """Settings for images with an objective for something else."""
        for table in ("adalase", "views"):
            if getattr(self, table) is not None:
                yield f"[{table}] with objective={self.objective!r}; it is for images: leave it out"
        if self.input_augment != "none":
            yield f"input_augment={self.input_augment!r} with objective={self.objective!r}; it is for images"
        if self.channels_last:
            yield f"channels_last=true with objective={self.objective!r}; it is for images: leave it out"
        if self.labels != 1:
            yield f"labels={self.labels} with objective={self.objective!r}, which sees no labels; leave it out"

    def _graph_problems(self) -> Iterator[str]:
        yield from self._image_problems()
        assert self.graph is not None
        if not self.graph.kinds and self.augment is None:
            yield "graph.kinds=[] without [augment]: both views of a graph are the same; name kinds, or augment a layer"
        if self.compile:
            yield "compile=true with graphs, each batch of which has another shape; leave it out"

    def _text_problems(self) -> Iterator[str]:
        yield from self._image_problems()
        assert self.text is not None
        if self.text.mlm_weight and self.objective != "simcse":
            yield f"text.mlm_weight={self.text.mlm_weight} with objective={self.objective!r}; it goes with simcse"
        if self.text.dev is None and self.text.dev_every is not None:
            yield f"text.dev_every={self.text.dev_every} without text.dev; say on which sts:PATH"
        if self.objective == "mlm" and self.temperature != 1:
            yield f"temperature={self.temperature} with mlm, which has none; leave it out"
        if self.augment is not None and self.augment.pairs == "one" and self.objective == "mlm":
            yield "augment.pairs='one' needs two views of each sentence; mlm has one"

    def _adalase_problems(self, adalase: AdaLASEConfig) -> Iterator[str]:
        if self.objective == "moco":
            yield "[adalase] goes with simclr, supcon or supervised: a validation batch must not enter MoCo's queue"
        if set(adalase.kinds) & set(MIXING) and self.objective != "supervised":
            yield f"adalase.kinds={list(adalase.kinds)} mix samples; only supervised has a mixed loss at a layer"
        if set(adalase.kinds) & set(MIXING) and (self.input_augment in MIXING or self.accumulate > 1):
            yield "latent mixing goes with neither input mixing nor accumulate above 1"
        if self.precision == "16-mixed":
            yield "[adalase] compares gradients, which 16-mixed scales; use precision='bf16-mixed' or '32-true'"

    def _near_queue(self) -> int:
        assert self.moco is not None
        assert self.moco.queue is not None
        keys = self.batch_size // self.accumulate
        return max(round(self.moco.queue / keys), 1) * keys

    def identity(self) -> str:
        """Sixteen hexadecimal digits that name the run.

        The hash of all settings but the places of the data, of `init` and of an encoder: their contents count instead.
        """
        settings = self.model_dump(mode="json", exclude={"init": True, "data": True, "text": {"dev"}})
        if self.text is not None and self.text.model_sha256 is not None:  # says more than a path
            del settings["model"]
        for name, value in LATER.items():
            if settings[name] == value:
                del settings[name]
        text = json.dumps({"schema": SCHEMA, **settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


TABLES: dict[str, type[BaseModel]] = {
    "augment": AugmentConfig,
    "freeze": FreezeConfig,
    "adalase": AdaLASEConfig,
    "dropout": DropoutConfig,
    "moco": MoCoConfig,
    "text": TextConfig,
    "graph": GraphConfig,
    "views": ViewsConfig,
}


def make_config(settings: dict[str, Any]) -> RunConfig:
    """Check settings and make a configuration of them.

    Raises:
        ConfigError: An unknown field (with the closest names), a wrong type, or a value outside its range.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from error


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, unchecked: the caller lays its own over them and then makes a config."""
    try:
        return parse_config(Path(path).read_text(encoding="utf-8"), repr(str(path)))
    except OSError as error:
        raise ConfigError(f"can't read the configuration {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}") from error


def parse_config(text: str, name: str) -> dict[str, Any]:
    """The settings in a TOML text, unchecked; `name` stands in errors."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error


_KINDS = {
    "model_type": "allowed: a table, such as [freeze] with part = …",
    "model_attributes_type": "allowed: a table, such as [freeze] with part = …",
    "dict_type": "allowed: a table",
    "tuple_type": "allowed: a list",
    "string_type": "allowed: a text; several names in one, with commas",
}


def overlay(settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Settings with others laid over them; tables are laid over tables.

    >>> overlay({"epochs": 5, "augment": {"layer": "layer4"}}, {"augment": {"rate": 0.25}})
    {'epochs': 5, 'augment': {'layer': 'layer4', 'rate': 0.25}}
    """
    made = {**settings}
    for key, value in over.items():
        below = made.get(key)
        made[key] = overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return made


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first of pydantic's complaints about a model as one line in our manner."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner = _owner(kind, first["loc"][:-1])
        return f"unknown setting {where!r}; {closest(where.rpartition('.')[2], owner.model_fields)}"
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        came = str(first["input"])
        return f"{where}={came!r} is unknown; {closest(came, allowed)} (allowed: {', '.join(allowed)})"
    complaint = _KINDS.get(first["type"]) or str(first["msg"]).removeprefix("Value error, ")
    if not where:  # a rule over several fields, which names them itself
        return complaint
    return f"{where}={first['input']!r}: {complaint[0].lower() + complaint[1:]}"


def _owner(kind: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that a place within a model belongs to."""
    for part in path:
        if part in kind.model_fields:
            models = [a for a in _inside(kind.model_fields[str(part)].annotation) if isinstance(a, type)]
            kind = next((a for a in models if issubclass(a, BaseModel)), kind)
    return kind


def _inside(annotation: Any) -> Iterator[Any]:
    """An annotation and everything that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _inside(part)
