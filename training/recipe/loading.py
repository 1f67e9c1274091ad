"""Recipes from files: TOML, the ones that ship with camcal, and those in result files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camcal.training.recipe.recipe import Recipe, parse_recipe
from camcal.training.recipe.section import RecipeError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, or by the name of one that ships with camcal, and apply `key=value` overrides.

    Args:
        source: the path of a TOML file or of a result file, or a name such as `digits`.
        overrides: `section.key=value`, the value in TOML syntax; bare words are strings, and `none` unsets a key
            that is optional.

    Raises:
        RecipeError: naming the key, what was found, and what is accepted.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{source}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {str(source)!r}: give a TOML file or one of: {shipped}")
    return parse_recipe(_read(path), path.name, overrides)


def _read(path: Path) -> dict[str, Any]:
    """A recipe as TOML, or the one in a result file (docs/results/*.json), which can so be repeated."""
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)["recipe"] if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if path.suffix == ".json":
            raise RecipeError(f"{path.name} is not a result file: it is not text in UTF-8") from None
        raise RecipeError(f"{path.name} is not valid TOML: {error}") from None
    except (ValueError, KeyError, TypeError):
        raw = None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path.name} is not a result file: expected JSON with a recipe in it")
    return raw
