"""One-line specifications: `kind`, `kind:argument` and `kind:argument,option=value`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from layerlens.errors import ConfigError, LayerlensError, UnknownNameError, closest

_OPTION = re.compile(r",([A-Za-z_]\w*)=([^,]*)$")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed specification.

    >>> parse_spec("resnet18-cifar,width=16")
    Spec(text='resnet18-cifar,width=16', kind='resnet18-cifar', argument='', options={'width': 16})
    """

    text: str
    kind: str
    argument: str
    options: dict[str, Any]

    def check_no_argument(self) -> None:
        """Refuse what follows a colon, for a kind that takes nothing there."""
        if self.argument:
            raise ConfigError(f"{self.text!r}: options follow the name with commas, such as {self.kind},option=value")

    def check_options(self, allowed: Iterable[str]) -> None:
        """Refuse an option that is not in `allowed`."""
        names = sorted(allowed)
        for key in self.options:
            if key not in names:
                hint = closest(key, names) if names else "it takes none"
                raise ConfigError(f"{self.text!r} has no option {key!r}; {hint}")


def parse_spec(text: str) -> Spec:
    """Split a specification; only trailing `,name=value` parts are options, so a path may hold commas."""
    rest, options = text.strip(), {}
    while found := _OPTION.search(rest):
        options[found[1]] = _literal(found[2])
        rest = rest[: found.start()]
    kind, _, argument = rest.partition(":")
    ordered = dict(reversed(options.items()))
    return Spec(text=text, kind=kind, argument=argument, options=ordered)


def is_factory(spec: Spec) -> bool:
    """Whether the specification can only mean `pkg.module:factory`."""
    return bool(_FACTORY.fullmatch(f"{spec.kind}:{spec.argument}"))


def call_factory(spec: Spec, options: dict[str, Any], known: Iterable[str] = ()) -> Any:
    """Import the callable behind `pkg.module:factory` and call it. Runs that module: only for names the user typed.

    Args:
        spec: The parsed specification.
        options: Keyword arguments.
        known: Kinds that may have been meant instead.

    Raises:
        UnknownNameError: No such module or callable.
        ConfigError: The module or the call failed.
    """
    try:
        module = importlib.import_module(spec.kind)
    except ModuleNotFoundError as error:
        raise UnknownNameError(
            f"can't import {spec.kind!r} for {spec.text!r}: {error}; {closest(spec.kind, known)}"
        ) from error
    except Exception as error:  # whatever that module raises
        raise ConfigError(f"importing {spec.kind!r} failed: {type(error).__name__}: {error}") from error
    factory = getattr(module, spec.argument, None)
    if not callable(factory):
        public = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise UnknownNameError(f"{spec.kind} has no callable {spec.argument!r}; {closest(spec.argument, public)}")
    try:
        return factory(**options)
    except (LayerlensError, MemoryError):
        raise
    except Exception as error:  # whatever that function raises
        raise ConfigError(f"{spec.text!r} failed: {type(error).__name__}: {error}") from error


def _literal(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
