"""`section.key=value`, as `--set` gives it."""

from __future__ import annotations

import tomllib
from typing import Any

from camcal.training.recipe.section import RecipeError


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of a recipe given as nested dicts, in place; see `load_recipe`."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = raw
    for part in parts[:-1]:
        if table.get(part) is None:  # a recipe from a checkpoint has null for unset keys
            table[part] = {}
        table = table[part]
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override!r}: {part!r} is not a section")
    table[parts[-1]] = value
