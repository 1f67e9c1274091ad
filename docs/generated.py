"""The parts of the site that are made from the code, and the mkdocs hook that puts them into their pages.

A page says `<!-- generated: NAME -->` where the part of that name goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import typer
import yaml
from prometheus_client.metrics import MetricWrapperBase
from pydantic.fields import FieldInfo

from camcal.__main__ import app
from camcal.models.bundle import Manifest
from camcal.service.environment import variable
from camcal.service.http.errors import KINDS
from camcal.service.metrics import Metrics
from camcal.service.settings import DEFAULT_BUNDLE, Settings
from camcal.training.recipe import reference

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"<!-- generated: (\w+) -->")

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_SCHEMA_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_ENTRY = re.compile(r"^(\w+(?:, \w+)*): ")  # of a docstring that describes fields, one a line or a few
_TYPES = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    return MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def settings() -> str:
    """Every setting of the service."""
    rows = (
        (f"`{variable(name)}`", _default(name, field.default), _accepted(field), field.description or "")
        for name, field in Settings.model_fields.items()
    )
    return _table(("variable", "default", "accepted", "meaning"), rows)


def metrics() -> str:
    """Every metric of the service."""
    exposed = Metrics()
    rows = []
    for metric in vars(exposed).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            rows.append((f"`{name}`", family.type, labels, family.documentation))
    return _table(("metric", "type", "labels", "meaning"), rows)


def problems() -> str:
    """Every kind of error that the service answers with."""
    rows = ((str(status), f"`{kind}`", title) for kind, (status, title) in KINDS.items())
    return _table(("status", "kind", "title"), sorted(rows))


def routes() -> str:
    """Every route and schema of openapi.yaml."""
    document = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    parts: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _route(f"{method.upper()} {path}", operation)
    parts.append("## Schemas")
    for name, schema in document["components"]["schemas"].items():
        parts += [f"### {name}", schema.get("description", ""), _properties(schema)]
    return "\n\n".join(part for part in parts if part)


def command_line() -> str:
    """Every command with its options."""
    return "\n\n".join(_command("camcal", typer.main.get_command(app)))


def manifest() -> str:
    """Every field of a bundle's manifest."""
    return _model(Manifest.model_json_schema())


def recipe() -> str:
    """Every key of a recipe."""
    return reference.tables()


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part for part in (settings, metrics, problems, routes, command_line, manifest, recipe)
}


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |"

    header = list(header)
    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])


def _default(name: str, value: object) -> str:
    if value == DEFAULT_BUNDLE:
        return "the shipped bundle"
    if value is None or value == "" or value == ():
        return "–"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if isinstance(value, int) and name.endswith("bytes"):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
            if value % size == 0:
                return f"`{value}` ({value // size} {unit})"
    return f"`{value}`"


def _accepted(field: FieldInfo) -> str:
    """What a field takes: the words of a choice, or a type with its bounds."""
    given = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not NoneType]
    if all(isinstance(kind, str) for kind in given):
        return ", ".join(f"`{word}`" for word in given)
    if get_origin(field.annotation) is tuple:
        return "list, separated by commas"
    bounds = [
        f"{sign} {_number(getattr(bound, key))}"
        for bound in field.metadata
        for key, sign in _BOUNDS.items()
        if hasattr(bound, key)
    ]
    return ", ".join([_TYPES.get(given[0], "text"), *bounds])


def _route(title: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"## `{title}`"
    yield operation.get("description") or operation.get("summary", "")
    if parameters := operation.get("parameters"):
        rows = [
            [
                f"`{found['name']}`",
                found["in"],
                _schema(found["schema"]),
                "required" if found["required"] else _shown(found["schema"].get("default")),
                found.get("description", ""),
            ]
            for found in parameters
        ]
        yield _table(("parameter", "in", "type", "default", "meaning"), rows)
    if body := operation.get("requestBody"):
        yield _table(("request body", ""), ((f"`{kind}`", _content(how)) for kind, how in body["content"].items()))
    rows = [
        [status, _contents(answer), answer.get("description", "")] for status, answer in operation["responses"].items()
    ]
    yield _table(("status", "content", ""), rows)


def _contents(answer: dict[str, Any]) -> str:
    return "; ".join(f"`{kind}` {_content(how)}".strip() for kind, how in answer.get("content", {}).items())


def _content(how: dict[str, Any]) -> str:
    return _schema(how["schema"]) if how.get("schema") else ""


def _model(document: dict[str, Any]) -> str:
    """A pydantic model and the ones it is made of, by the JSON schema; docstrings describe the fields."""
    parts = [*_fields(document)]
    for name, schema in document["$defs"].items():
        parts += [f"### {name}", *_fields(schema)]
    return "\n\n".join(part for part in parts if part)


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    introduction, descriptions = _described(schema.get("description", ""))
    yield introduction
    yield _properties(schema, descriptions)


def _described(docstring: str) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its entries `name: text`, and the entries."""
    introduction: list[str] = []
    entries: dict[str, list[str]] = {}
    lines = introduction
    for line in docstring.splitlines():
        if found := _ENTRY.match(line):
            lines = [line[found.end() :]]
            entries |= dict.fromkeys(found[1].split(", "), lines)
        else:
            lines.append(line)
    return _plain(" ".join(introduction)), {name: _plain(" ".join(text)) for name, text in entries.items()}


def _properties(schema: dict[str, Any], descriptions: dict[str, str] | None = None) -> str:
    fields = schema.get("properties", {})
    needed = schema.get("required", ())
    rows = (
        (
            f"`{name}`",
            _schema(found),
            "required" if name in needed else _shown(found.get("default")),
            found.get("description") or (descriptions or {}).get(name, ""),
        )
        for name, found in fields.items()
    )
    return _table(("field", "type", "default", "meaning"), rows) if fields else ""


def _shown(default: object) -> str:
    return "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`"


def _schema(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words, with a link to a named one."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(map(_schema, schema[key])))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{word}`" for word in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array" and schema.get("items"):
        return f"list of {_schema(schema['items'])}"
    return ", ".join(
        [kind, *(f"{sign} {_number(schema[key])}" for key, sign in _SCHEMA_BOUNDS.items() if key in schema)]
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) or value.is_integer() else f"{value:g}"


def _command(name: str, command: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=name)
    if name != "camcal":
        yield f"## {name}"
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"```text\n{usage.replace('{', '').replace('}', '')}\n```"
    yield "\n\n".join(_plain(part) for part in (command.help or "").split("\n\n"))
    options = [found for found in command.params if not found.hidden and found.help]
    rows = ((f"`{_called(found, context)}`", found.help) for found in options)
    yield _table(("argument or option", "meaning"), rows) if options else ""
    for child, found in getattr(command, "commands", {}).items():
        if not found.hidden:
            yield from _command(f"{name} {child}", found)


def _called(found: Any, context: typer.Context) -> str:
    if found.param_type_name == "argument":
        return " ".join(found.get_usage_pieces(context)).replace("{", "").replace("}", "")
    return str(found.get_help_record(context)[0])


def _plain(docstring: str) -> str:
    return " ".join(docstring.split())
