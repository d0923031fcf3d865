"""What a study says: a base configuration, arms, axes, seeds, what is measured, what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from layerlens.errors import ConfigError, check_known, closest
from layerlens.packaged import packaged_names, packaged_text
from layerlens.training.config import TABLES, RunConfig, explain, overlay, parse_config, read_config
from layerlens.training.recipes import read_recipe

SCALES = ("smoke", "hour", "published")
WORDS = {
    "each layer": (False, True),
    "each layer but the last": (False, False),
    "input and each layer": (True, True),
    "input and each layer but the last": (True, False),
}  # whether the input and the last layer are among them
WORDED = ("augment.layer", "freeze.layer", "adalase.layers")  # axes that take these words

Axes = dict[str, Any]  # field -> list of values, or words
Seeds = int | tuple[int, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Arm(_Strict):
    """Runs that are one line of a figure.

    `settings` are laid over the study's base; `axes` are varied in this arm only. `start` names the runs from whose
    last checkpoints these start, seed by seed.
    """

    name: str = Field(min_length=1)
    baseline: bool = Field(False, description="what the other arms are compared with, seed by seed")
    start: str | None = None
    settings: dict[str, Any] = {}
    axes: Axes = {}
    transfer: tuple[str, ...] = Field((), description="other data on which each checkpoint is scored")


class Measure(_Strict):
    """What is measured at every kept checkpoint of every run."""

    scores: bool = Field(True, description="k-NN, linear probe, alignment and uniformity")
    cka: bool = Field(True, description="similarity of all layers")
    k: int = Field(200, ge=1, description="neighbours")
    protocol: str | None = Field(None, description="of the linear probe; logistic regression if left out")
    samples: int = Field(1000, ge=4, description="images of the test split for similarity and geometry")
    batch_size: int = Field(100, ge=4, description="images per batch of the similarity")
    untrained: Literal["all", "baseline"] = Field("all", description="runs whose first checkpoint is scored too")


class Drawing(_Strict):
    """A figure of a study: `sweep` over an axis, `epochs`, `similarity` heat maps, the `geometry` plane, a `grid`, or
    what a `freeze` costs.

    `x` and `lines` are short names of axes, such as `layer`, `rate` or `arm`; without lines every axis that varies
    makes lines. A grid has `lines` as its rows; similarity and geometry need neither.
    """

    kind: Literal["sweep", "epochs", "similarity", "geometry", "grid", "freeze"]
    name: str = Field(pattern=r"^[a-z0-9_]+$", description="of its files")
    metric: str = "probe"
    x: str = "layer"
    lines: tuple[str, ...] = ()
    arms: tuple[str, ...] = Field((), description="arms that are drawn; all by default")
    transfer: bool = Field(False, description="the score on the other data")


class Scale(_Strict):
    """How large a study is: laid over its settings, its axes and its seeds."""

    about: str = ""
    recipe: str | None = Field(None, description="published setting that the base rests on")
    base: dict[str, Any] = {}
    axes: Axes = Field({}, description="replace axes of the same names, wherever they stand")
    arms: dict[str, dict[str, Any]] = Field({}, description="settings laid over those of the arm of that name")
    seeds: Seeds | None = None
    measure: dict[str, Any] = {}
    transfer: dict[str, tuple[str, ...]] = Field({}, description="other data, by arm")

    @field_validator("seeds", mode="before")
    @classmethod
    def _some(cls, value: Any) -> Seeds | None:
        return None if value is None else _checked(value)


class Study(_Strict):
    """A table of runs, stated once.

    Attributes:
        name: What it is called; the name of its folder in a store.
        about: One line.
        seeds: How many, counted from 0, or which.
        base: Settings of every run, as for `make_config`.
        axes: Field (`augment.layer`) -> values; every run and every start has one value of each.
        starts: Settings laid over the base, by name: runs from whose last checkpoints arms start.
        arms: What is compared; a single arm by default.
        measure: What is measured at each kept checkpoint.
        figures: What is drawn.
        scales: Sizes by name; `at_scale` makes a study of one.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)]
    about: str = ""
    seeds: Seeds = 1
    base: dict[str, Any] = {}
    axes: Axes = {}
    starts: dict[str, dict[str, Any]] = {}
    arms: tuple[Arm, ...] = (Arm(name="runs"),)
    measure: Measure = Measure()
    figures: tuple[Drawing, ...] = ()
    scales: dict[str, Scale] = {}

    @field_validator("seeds", mode="before")
    @classmethod
    def _some(cls, value: Any) -> Seeds:
        return _checked(value)

    @model_validator(mode="after")
    def _check(self) -> Study:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    @property
    def seed_list(self) -> tuple[int, ...]:
        """Each seed of the study."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def _problems(self) -> Iterator[str]:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names) or not names:
            yield f"arms need names that differ, and there must be one; got {names}"
        if both := set(names) & set(self.starts):
            yield f"{sorted(both)} name an arm and a start; give them different names"
        for arm in self.arms:
            if arm.start is not None and arm.start not in self.starts:
                yield f"arm {arm.name!r}: start={arm.start!r} is unknown; {closest(arm.start, self.starts)}"
            yield from _settings_problems(f"arm {arm.name!r}", arm.settings)
            if twice := set(arm.axes) & set(self.axes):
                yield f"arm {arm.name!r}: {sorted(twice)} are axes of the whole study already"
            yield from _axis_problems(f"arm {arm.name!r}: ", arm.axes, beside=self.axes)
        yield from _settings_problems("base", self.base)
        yield from _axis_problems("", self.axes)
        for name, settings in self.starts.items():
            yield from _settings_problems(f"start {name!r}", settings)
        known = {*self.axes, *(axis for arm in self.arms for axis in arm.axes)}
        for label, scale in self.scales.items():
            if label not in SCALES:
                yield f"scale {label!r} is unknown; {closest(label, SCALES)}"
            yield from _settings_problems(f"scale {label!r}", scale.base)
            yield from _axis_problems(f"scale {label!r}: ", scale.axes)
            if extra := set(scale.axes) - known:
                yield f"scale {label!r}: {sorted(extra)} are no axes of this study; {closest(min(extra), known)}"
            for key in set(scale.measure) - set(Measure.model_fields):
                yield f"scale {label!r}: unknown setting 'measure.{key}'; {closest(key, Measure.model_fields)}"
            for arm_name, settings in scale.arms.items():
                yield from _settings_problems(f"scale {label!r}, {arm_name!r}", settings)
            for arm_name in scale.transfer:
                if arm_name in self.starts:
                    yield f"scale {label!r}: transfer of the start {arm_name!r}; only arms are scored on other data"
            for arm_name in (*scale.arms, *scale.transfer):
                if arm_name not in (*names, *self.starts):
                    yield f"scale {label!r}: no arm {arm_name!r}; {closest(arm_name, [*names, *self.starts])}"

    def at_scale(self, scale: str | None, **settings: Any) -> Study:
        """The study at one of its sizes, with other settings of the base laid over it.

        Args:
            scale: `smoke`, `hour` or `published`; None for the study as it stands.
            **settings: Fields of `RunConfig`, such as `model` and `data`.

        Raises:
            UnknownNameError: It has no such scale.
        """
        content = self.model_dump(exclude={"scales"})
        if scale is not None:
            check_known("scale", scale, self.scales)
            size = self.scales[scale]
            foundation = read_recipe(size.recipe) if size.recipe else {}
            content["base"] = overlay(overlay(foundation, self.base), size.base)
            content["seeds"] = self.seeds if size.seeds is None else size.seeds
            content["measure"] |= size.measure
            content["name"] = f"{self.name}-{scale}"
            content["axes"] = {name: size.axes.get(name, values) for name, values in self.axes.items()}
            for arm in content["arms"]:
                arm["axes"] = {name: size.axes.get(name, values) for name, values in arm["axes"].items()}
                arm["settings"] = overlay(arm["settings"], size.arms.get(arm["name"], {}))
                arm["transfer"] = size.transfer.get(arm["name"], arm["transfer"])
            content["starts"] = {n: overlay(s, size.arms.get(n, {})) for n, s in self.starts.items()}
        content["base"] = overlay(content["base"], settings)
        return make_study(content)


def make_study(content: dict[str, Any]) -> Study:
    """Check what a study file says.

    Raises:
        ConfigError: An unknown key (with the closest ones), an axis over an unknown field, a wrong value.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, Study)) from error


def read_study(what: str | Path) -> Study:
    """A ready study by its name, or one from a TOML file.

    Raises:
        ConfigError: It can't be read, or says something that is not allowed.
        UnknownNameError: No such file, and no ready study of that name.
    """
    text = str(what)
    if text.endswith(".toml") or Path(text).is_file():
        return make_study({"name": Path(text).stem, **read_config(text)})
    return make_study({"name": text, **parse_config(study_text(text), f"study {text}")})


def study_names() -> list[str]:
    """Names of the ready studies, in alphabetical order."""
    return packaged_names("studies")


def study_text(name: str) -> str:
    """The file of a ready study.

    Raises:
        UnknownNameError: There is none of that name.
    """
    return packaged_text("studies", "study", name)


def axis_name(field: str) -> str:
    """The short name of an axis, as it stands in tables: `augment.layer` -> `layer`.

    >>> axis_name("augment.stop_gradient"), axis_name("adalase.layers"), axis_name("freeze.layer")
    ('stop_gradient', 'layer', 'layer')
    """
    name = field.rpartition(".")[2]
    return {"layers": "layer", "data": "trained_on"}.get(name, name)


def _settings_problems(where: str, settings: dict[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if key not in RunConfig.model_fields:
            yield f"{where}: unknown setting {key!r}; {closest(key, RunConfig.model_fields)}"
        elif key in TABLES and isinstance(value, dict):
            for name in value:
                if name not in TABLES[key].model_fields:
                    yield f"{where}: unknown setting {key + '.' + name!r}; {closest(name, TABLES[key].model_fields)}"
        if key in ("seed", "data_sha256", "init_sha256"):
            yield f"{where}: {key!r} is filled in by the study" + ("; set seeds" if key == "seed" else "")


def _axis_problems(where: str, axes: Axes, beside: Axes | None = None) -> Iterator[str]:
    short = {axis_name(field): field for field in beside or {}}
    for field, values in axes.items():
        yield from _field_problems(where, field, values)
        if isinstance(values, str):
            if field not in WORDED:
                yield f"{where}axis {field!r} = {values!r}; allowed: a list"
            elif values not in WORDS:
                yield f"{where}axis {field!r} = {values!r}; {closest(values, WORDS)}, or a list"
        elif not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
            yield f"{where}axis {field!r} = {values!r}; allowed: a list of different values"
        if axis_name(field) in short:
            yield f"{where}axes {short[axis_name(field)]!r} and {field!r} would have the same name in tables"
        short[axis_name(field)] = field


def _field_problems(where: str, field: str, values: Any) -> Iterator[str]:
    fields = [f"{table}.{name}" for table, kind in TABLES.items() for name in kind.model_fields]
    fields += [name for name in RunConfig.model_fields if name not in TABLES]
    if isinstance(values, dict):
        name = next(iter(values), "rate")
        yield f'{where}axis {field!r} = {values!r}; allowed: a list, the field in quotes: "{field}.{name}" = [...]'
    if field in ("seed", "data_sha256", "init_sha256", "init"):
        yield f"{where}axis over {field!r}; use " + ("starts" if field == "init" else "seeds")
    if field not in fields:
        last = field.rpartition(".")[2]
        same = [name for name in fields if name.rpartition(".")[2] == last]
        yield f"{where}axis over unknown field {field!r}; " + (
            f"closest: {', '.join(same)}" if same else closest(field, fields)
        )


def _checked(seeds: Any) -> Seeds:
    listed = list(seeds) if isinstance(seeds, list | tuple) else [seeds]
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in listed)
    least = 0 if isinstance(seeds, list | tuple) else 1
    if not whole or not listed or len(set(listed)) != len(listed) or min(listed) < least:
        raise ValueError("allowed: how many, from 1, or a list of different numbers from 0")
    return tuple(listed) if isinstance(seeds, list | tuple) else seeds
