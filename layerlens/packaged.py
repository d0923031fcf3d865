"""TOML files that come with the package, by name."""

from __future__ import annotations

from importlib import resources

from layerlens.errors import check_known


def packaged_names(folder: str) -> list[str]:
    """Names of all TOML files in a folder of the package, in alphabetical order."""
    names = (path.name for path in resources.files("layerlens").joinpath(folder).iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def packaged_text(folder: str, kind: str, name: str) -> str:
    """One of these files.

    Raises:
        UnknownNameError: There is none of that name; `kind` says what was sought.
    """
    check_known(kind, name, packaged_names(folder))
    return resources.files("layerlens").joinpath(folder, f"{name}.toml").read_text(encoding="utf-8")
