"""Errors in a recipe, as sentences."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel


def _section(model: type[BaseModel], where: Sequence[str | int]) -> type[BaseModel]:
    """The model of the table at `where` inside `model`."""
    for part in where:
        field = model.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return model


def sentence(item: Any, origin: str, root: type[BaseModel]) -> str:
    """One of pydantic's errors about `root`, naming the key; `origin` is where the recipe comes from."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = list(_section(root, item["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{origin}: unknown key {where!r}{hint}; accepted here: {', '.join(known)}"
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):
        return f"{origin}: {where.rpartition('.')[0]!r} has too few values (found {item['input']!r})"
    if item["type"] == "missing":
        return f"{origin}: {where!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
    return f"{origin}: {where!r}: {message}{found}" if where else f"{origin}: {message}"
