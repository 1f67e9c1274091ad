"""`GET /cam/{id}`: the heatmap of one class of one prediction, as a picture or in numbers."""

from __future__ import annotations

import hashlib
import io
import time
from typing import Annotated, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Header, Query, Response

from service.colormaps import Colormap
from service.errors import Problem, bad_parameter
from service.explanation import Explanation
from service.heatmap import render
from service.routes.documented import binary, header, problems
from service.runtime import Key, Running, Runtime, log
from service.schemas import Contributions
from service.stores import is_id

router = APIRouter()

Format = Literal["png", "webp", "jpeg", "json", "npy"]

_MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "json": "application/json",
    "npy": "application/octet-stream",
}
_HEADERS = {"ETag": header("Of this very picture."), "Cache-Control": header("Private, to the end of its life.")}
_BINARY = binary("image/png", "image/webp", "image/jpeg", "application/octet-stream")


@router.get(
    "/cam/{id}",
    dependencies=[Key],
    response_model=Contributions,
    responses={
        200: {"description": "The heatmap, in the `format` asked for.", "headers": _HEADERS, "content": _BINARY},
        304: {"description": "The copy whose ETag came in If-None-Match is still good."},
        **problems(401, 404, 422, 500, 503),
    },
    summary="Draw a heatmap",
)
async def cam(
    runtime: Running,
    id: str,
    class_: Annotated[
        str | None, Query(alias="class", description="Index or label, one of the prediction's; the best by default.")
    ] = None,
    calibrated: Annotated[bool, Query(description="Explain the calibrated score, or the plain one.")] = True,
    overlay: Annotated[bool, Query(description="Lay the colours on the picture.")] = True,
    colormap: Annotated[Colormap, Query(description="Colours, from none of the evidence to most.")] = "turbo",
    alpha: Annotated[float, Query(ge=0, le=1, description="How much the strongest colour covers.")] = 0.6,
    size: Annotated[int, Query(ge=16, le=1024, description="Longest side, in px.")] = 384,
    format: Annotated[Format, Query(description="`json` and `npy` give the exact contributions.")] = "png",
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A picture of where the evidence is; `json` and `npy` hold the signed contributions that sum to the score."""
    explanation = await _find(runtime, id)
    place = _place(explanation, class_, len(runtime.manifest.classes))
    options = (id, place, calibrated, overlay, colormap, alpha, size, format)
    etag = f'"{hashlib.sha256(repr(options).encode()).hexdigest()[:32]}"'
    life_s = max(0, int(explanation.expires_at - time.time()))
    headers = {"ETag": etag, "Cache-Control": f"private, max-age={life_s}"}
    if if_none_match and _matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)

    def draw() -> bytes:
        started = time.perf_counter()
        if format == "json":
            body = _numbers(explanation, place, calibrated)
        elif format == "npy":
            body = _npy(explanation, place, calibrated)
        else:
            body = render(
                explanation.contributions(place, calibrated),
                explanation.picture,
                explanation.picture_size,
                size=size,
                colormap=colormap,
                alpha=alpha,
                on_picture=overlay,
                format=format,
            )
        runtime.metrics.stage_seconds.labels("render").observe(time.perf_counter() - started)
        return body

    return Response(await runtime.in_thread(draw), headers=headers, media_type=_MEDIA_TYPES[format])


async def _find(runtime: Runtime, id: str) -> Explanation:
    data = None
    if is_id(id):
        try:
            data = await runtime.store.get(id)
        except Exception as error:  # whatever a store can raise; for the client the heatmap is lost
            log.warning("a heatmap could not be read: %s", error)
            runtime.metrics.store_failures.labels("get").inc()
    runtime.metrics.store_reads.labels("hit" if data else "miss").inc()
    if data is None:
        life = f"{runtime.settings.cam_ttl_s:g} s"
        raise Problem("not-found", f"no heatmap has this id, or its life of {life} is over; predict again")
    return Explanation.unpack(data)


def _place(explanation: Explanation, wanted: str | None, classes: int) -> int:
    """Where class `wanted` stands among the maps kept. Digits below the number of classes are an index."""
    if wanted is None:
        return 0
    is_index = wanted.isascii() and wanted.isdecimal() and int(wanted[:9]) < classes
    try:
        return explanation.classes.index(int(wanted)) if is_index else explanation.labels.index(wanted)
    except ValueError:
        pairs = zip(explanation.classes, explanation.labels, strict=True)
        kept = ", ".join(f"{k} ({label})" for k, label in list(pairs)[:20])
        message = f"class is {wanted[:100]!r}; this prediction kept {kept}: predict with a larger top_k for more"
        raise bad_parameter("class", message) from None


def _matches(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _numbers(explanation: Explanation, place: int, calibrated: bool) -> bytes:
    contributions = explanation.contributions(place, calibrated)
    body = {
        "class_id": explanation.classes[place],
        "label": explanation.labels[place],
        "calibrated": calibrated,
        "contributions": contributions,
        "sum": float(contributions.sum(dtype=np.float64)),
        "score": explanation.score(place, calibrated),
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _npy(explanation: Explanation, place: int, calibrated: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, explanation.contributions(place, calibrated))
    return buffer.getvalue()
