"""Query parameters that are sent as text fields of the form instead."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, TypeVar, get_origin

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from camcal.service.http.body import FIELD
from camcal.service.http.errors import Problem, bad_parameter
from camcal.service.http.multipart import Part

MAX_VALUE_BYTES = 1024

Options = TypeVar("Options", bound=BaseModel)


def with_fields(options: Options, queried: Container[str], fields: Sequence[Part]) -> Options:
    """`options`, of which `queried` were in the query, updated with the `fields` of the form.

    Raises:
        Problem: 422 for a field that is not an option, or has another value in the query or in the form.
        RequestValidationError: for an invalid value.
    """
    given: dict[str, list[str]] = {}
    for part in fields:
        given.setdefault(_name(part, options), []).append(_text(part))
    model, values = type(options), dict[str, Any]()
    for name, texts in given.items():
        repeatable = get_origin(model.model_fields[name].annotation) is list
        if not repeatable and len(set(texts)) > 1:
            raise _bad(name, f"the form has the field {name} twice with different values; send it once")
        values[name] = texts if repeatable else texts[0]
    try:
        formed = model(**values)
    except ValidationError as error:
        raise RequestValidationError([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None
    for name in values:
        query, form = getattr(options, name), getattr(formed, name)
        if name in queried and query != form:
            message = f"{name} is {query!r:.100} in the query and {form!r:.100} in the form; send it once"
            raise _bad(name, message)
    return options.model_copy(update={name: getattr(formed, name) for name in values})


def form_schema(image: dict[str, Any]) -> dict[str, Any]:
    """The schema of a form with the field `image`.

    The other fields are documented as query parameters only. Otherwise generated clients would send their defaults
    twice, and a default in the form would contradict another value in the query.
    """
    return {
        "type": "object",
        "required": [FIELD],
        "properties": {FIELD: image},
        "additionalProperties": {"type": "string", "description": "A query parameter, as text."},
    }


def _name(part: Part, options: BaseModel) -> str:
    accepted = type(options).model_fields
    if part.name not in accepted:
        name, others = part.name[:100], ", ".join(accepted)
        raise _bad(name, f"{name!r} is not a field of this form; it accepts {FIELD} for the image, and {others}")
    return part.name


def _text(part: Part) -> str:
    if part.is_file:
        raise _bad(part.name, f"{part.name} is a file; send it as text, without a file name")
    if len(part.data) > MAX_VALUE_BYTES:
        raise _bad(part.name, f"{part.name} has {len(part.data)} bytes; the limit is {MAX_VALUE_BYTES}")
    try:
        return bytes(part.data).decode()
    except UnicodeDecodeError:
        raise _bad(part.name, f"{part.name} is not text in UTF-8") from None


def _bad(name: str, message: str) -> Problem:
    return bad_parameter(name, message, "body")
