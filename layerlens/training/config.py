"""Run configurations: every number that decides a run's result, checked, with its unit."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError, field_validator, model_validator

from layerlens.errors import ConfigError, closest

SCHEMA = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AugmentConfig(_Strict):
    """Deep Augmentation of one run; the meaning of each field is that of `DeepAugmentation`."""

    layer: str
    transform: Literal["dropout", "pca"] = "dropout"
    rate: float = Field(0.5, ge=0, le=1, description="dropout rate, a probability")
    fraction: float = Field(0.5, ge=0, le=1, description="share of the samples, a probability")
    stop_gradient: bool = False
    components: int = Field(1, ge=-6, le=6, description="principal components removed by pca")

    @field_validator("components")
    @classmethod
    def _not_none(cls, value: int) -> int:
        if value == 0:
            raise ValueError("allowed: 1 to 6 (first ones) or -6 to -1 (last ones)")
        return value


class ViewsConfig(_Strict):
    """Random views of one run; the meaning of each field is that of `Views`."""

    scale: float = Field(0.2, gt=0, le=1, description="smallest crop, share of the image's area")
    ratio: float = Field(4 / 3, ge=1, description="largest aspect ratio of a crop")
    flip: float = Field(0.5, ge=0, le=1, description="probability")
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = Field(0.8, ge=0, le=1, description="probability")
    grey: float = Field(0.2, ge=0, le=1, description="probability")


class RunConfig(_Strict):
    """One training run. Two runs with equal configurations are the same run.

    `learning_rate` is the peak, reached after `warmup_epochs`; None means 0.06 · batch_size / 128.
    `views` None means the data set's usual ones; `train` writes down what that was.
    """

    objective: Literal["simclr", "supervised"] = "simclr"
    model: str = "resnet18-cifar"
    data: str = "digits"
    seed: int = Field(0, ge=0, lt=2**63)
    epochs: int = Field(100, ge=1, description="passes over the training split")
    batch_size: int = Field(256, ge=4, description="images per step; a contrastive step sees twice as many views")
    learning_rate: float | None = Field(None, gt=0, description="per step, at its peak")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0, description="L2 factor")
    warmup_epochs: float = Field(5.0, ge=0, description="epochs of linear warm-up")
    temperature: float = Field(0.5, gt=0, description="NT-Xent's T")
    loss_scale: float = Field(1.0, gt=0, description="factor on the loss; the paper's code base has T / 0.07")
    projection: int = Field(128, ge=2, description="outputs of the projection head")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the training split kept for the online k-NN")
    knn_every: int = Field(1, ge=1, description="epochs between two online k-NN scores")
    keep_every: int = Field(10, ge=1, description="epochs between two kept checkpoints; first and last are kept too")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    views: ViewsConfig | None = None
    augment: AugmentConfig | None = None
    init: str | None = Field(None, description="checkpoint whose weights the run starts from")
    init_sha256: str | None = Field(None, description="fingerprint of that file; filled in by `train`")
    data_sha256: str | None = Field(None, description="fingerprint of the data; filled in by `train`")

    @model_validator(mode="after")
    def _fill_in(self) -> RunConfig:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 0.06 * self.batch_size / 128)
        return self

    def identity(self) -> str:
        """Sixteen hexadecimal digits that name the run.

        The hash of all settings but the places of the data and of `init`: their contents count instead.
        """
        settings = self.model_dump(mode="json", exclude={"init", "data"})
        text = json.dumps({"schema": SCHEMA, **settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_config(settings: dict[str, Any]) -> RunConfig:
    """Check settings and make a configuration of them.

    Raises:
        ConfigError: An unknown field (with the closest names), a wrong type, or a value outside its range.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, unchecked: the caller lays its own over them and then makes a config."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the configuration {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}") from error


def _explain(error: ValidationError) -> str:
    """The first of pydantic's complaints as one line in our manner."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owners: dict[str, type[BaseModel]] = {"augment": AugmentConfig, "views": ViewsConfig}
        owner = owners.get(str(first["loc"][0]), RunConfig)
        return f"unknown setting {where!r}; {closest(where.rpartition('.')[2], owner.model_fields)}"
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        came = str(first["input"])
        return f"{where}={came!r} is unknown; {closest(came, allowed)} (allowed: {', '.join(allowed)})"
    return f"{where}={first['input']!r}: {first['msg'][0].lower() + first['msg'][1:]}"
