"""The reference of all recipe keys, made from their descriptions."""

from __future__ import annotations

import difflib
import inspect
import json
import textwrap
from typing import Any

from camcal.training.recipe.idle import only_with
from camcal.training.recipe.recipe import Recipe
from camcal.training.recipe.section import RecipeError, Section

_INTRODUCTION = """\
# Recipe keys

A recipe is a TOML file with a table for each section. `camcal train RECIPE --set section.key=value` changes one value;
`none` unsets a key that has no default. `camcal recipe` prints this reference in the terminal.
"""


def sections() -> dict[str, type[Section]]:
    """The sections of a recipe by name."""
    found = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def markdown() -> str:
    """The reference as a Markdown page."""
    return f"{_INTRODUCTION}\n{tables()}"


def tables() -> str:
    """The body of that page: a table for each section."""
    top = [key for key in Recipe.model_fields if key not in sections()]
    parts = ["## Top level\n", _table([(key, key) for key in top])]
    for section, kind in sections().items():
        parts.append(f"## `{section}`\n\n{_doc(kind)}\n")
        parts.append(_table([(key, f"{section}.{key}") for key in kind.model_fields]))
    return "\n".join(parts)


def text(wanted: str = "", width: int = 100) -> str:
    """What `camcal recipe` prints: all sections, one section, or one key, in lines of at most `width` characters.

    Raises:
        RecipeError: if there is no such section or key.
    """
    if not wanted:
        lines = [f"  {name:<10} {_doc(kind).partition('. ')[0].rstrip('.')}" for name, kind in sections().items()]
        return "\n".join(["Sections of a recipe; `camcal recipe SECTION` lists the keys of one:", *lines])
    if wanted in sections():
        kind = sections()[wanted]
        about = textwrap.fill(_doc(kind).replace("`", ""), width)
        return "\n\n".join([about, *(_entry(f"{wanted}.{key}", width) for key in kind.model_fields)])
    return _entry(wanted, width)


def _entry(key: str, width: int) -> str:
    values = f"{_kind(_schema(key))}; {_default(key)}"
    wrapper = textwrap.TextWrapper(width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([key, *(wrapper.fill(part.replace("`", "")) for part in (values, _about(key)))])


def _doc(kind: type[Section]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").replace("\n\n", " ").replace("\n", " ")


def _table(keys: list[tuple[str, str]]) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, key in keys:
        cells = (f"`{name}`", _kind(_schema(key)), _default(key).removeprefix("default: "), _about(key))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _about(key: str) -> str:
    """The description of a key, and where alone it has an effect."""
    about = _schema(key)["description"]
    return f"{about} Only with {needs}." if (needs := only_with(key)) else str(about)


def _schema(key: str) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    kind = sections().get(section) if section else Recipe
    known = [f"{section}.{other}" for section, kind in sections().items() for other in kind.model_fields]
    if kind is None or name not in kind.model_fields or key in sections():
        close = difflib.get_close_matches(key, [*known, *sections(), "name", "seed"], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"no recipe key {key!r}{hint or '; camcal recipe lists the sections'}")
    found: dict[str, Any] = kind.model_json_schema()["properties"][name]
    return found


def _kind(schema: dict[str, Any]) -> str:
    """The values that a JSON schema accepts, in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number" as kind:
            return " ".join([kind, *_bounds(schema)])
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(_kind(each) for each in schema['prefixItems'])}]"
        case "array":
            return f"list of {_kind(schema['items'])}"
        case "object":
            return "table"
        case _:
            return "path" if schema.get("format") == "path" else "text"


def _bounds(schema: dict[str, Any]) -> list[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[bound]}" for bound, sign in signs.items() if bound in schema]
    return [", ".join(found)] if found else []


def _default(key: str) -> str:
    schema = _schema(key)
    if "default" not in schema:
        return "required"
    return "not set" if schema["default"] is None else f"default: `{json.dumps(schema['default'])}`"
