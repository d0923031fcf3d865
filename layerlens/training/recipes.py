"""Published settings, ready to run; each file's header says what it should reach, and what we measured."""

from __future__ import annotations

from typing import Any

from layerlens.packaged import packaged_names, packaged_text
from layerlens.training.config import parse_config


def recipe_names() -> list[str]:
    """Names of all recipes, in alphabetical order."""
    return packaged_names("recipes")


def recipe_text(name: str) -> str:
    """A recipe's file, header included.

    Raises:
        UnknownNameError: There is none of that name.
    """
    return packaged_text("recipes", "recipe", name)


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's settings, unchecked, as `read_config` gives them."""
    return parse_config(recipe_text(name), f"recipe {name}")


def list_recipes() -> list[dict[str, str]]:
    """Name and first line of each recipe."""
    return [{"name": name, "about": recipe_text(name).splitlines()[0].lstrip("# ")} for name in recipe_names()]
