"""`GET /cam/{id}`: the heatmap of one class of a prediction, as an image or as numbers."""

from __future__ import annotations

import hashlib
import io
import logging
import time
from typing import Annotated, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Header, Path, Query, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from camcal.service.address import client_address
from camcal.service.engine.ranking import is_index
from camcal.service.heatmaps.colormaps import DEFAULT, DEFAULT_SIGNED, Colormap
from camcal.service.heatmaps.explanation import Explanation
from camcal.service.heatmaps.heatmap import View, render
from camcal.service.heatmaps.legend import MIN_SIZE
from camcal.service.heatmaps.stores import is_id
from camcal.service.http.access import needs, owner_of
from camcal.service.http.dependencies import Running, while_connected
from camcal.service.http.documented import binary, header, problems
from camcal.service.http.errors import Problem, bad_parameter
from camcal.service.http.runtime import Runtime
from camcal.service.metrics import server_timing

log = logging.getLogger("camcal")

router = APIRouter(tags=["heatmaps"])

PredictionId = Annotated[str, Path(description="`id` of a prediction.")]
Format = Literal["png", "webp", "jpeg", "json", "npy"]

_MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "json": "application/json",
    "npy": "application/octet-stream",
}
_HEADERS = {
    "ETag": header("Changes with the heatmap and all parameters."),
    "Cache-Control": header("Private, until the heatmap expires."),
    "Server-Timing": header("Duration of render in milliseconds."),
}
# The default comes first, and JSON last: generators of clients take the first that they know for all formats.
_CONTENT = {
    **binary("image/png", "image/webp", "image/jpeg", "application/octet-stream"),
    "application/json": {"schema": {"$ref": "#/components/schemas/Contributions"}},
}


class CamOptions(BaseModel):
    """Query parameters of `GET /cam/{id}`."""

    model_config = ConfigDict(extra="forbid")

    class_: str | None = Field(
        None,
        alias="class",
        description="Index or label of one of the classes whose heatmap was kept. By default the best class.",
    )
    versus: str | None = Field(
        None, description="Index or label of a class to subtract, to see what speaks for one rather than the other."
    )
    calibrated: bool = Field(True, description="Explain the calibrated score, or the plain score if false.")
    overlay: bool = Field(True, description="Draw the heatmap over the image.")
    signed: bool | None = Field(
        None,
        description="Show evidence against the class too: the middle of the colour map is zero. By default true with "
        "`versus` or the colour map `coolwarm`.",
    )
    scale: Literal["map", "image"] = Field(
        "map",
        description="What the strongest colour stands for: the highest contribution in this heatmap (`map`) or in all "
        "heatmaps kept for the image (`image`), which makes their colours comparable.",
    )
    colormap: Colormap | None = Field(None, description=f"By default `{DEFAULT}`, or `{DEFAULT_SIGNED}` if signed.")
    alpha: float = Field(0.6, ge=0, le=1, description="Opacity of the strongest colour.")
    size: int = Field(384, ge=16, le=1024, description="Longest side in pixels, including the legend.")
    legend: bool = Field(
        False, description=f"Add class, score and colour scale below the image. Needs a size of at least {MIN_SIZE}."
    )
    format: Format = Field("png", description="`json` and `npy` return the exact contributions.")

    @property
    def zero_in_the_middle(self) -> bool:
        """The value of `signed`, or its default."""
        return (self.versus is not None or self.colormap == DEFAULT_SIGNED) if self.signed is None else self.signed


@router.get(
    "/cam/{id}",
    dependencies=[needs("cam")],
    response_class=Response,
    responses={
        200: {"description": "The heatmap in the requested `format`.", "headers": _HEADERS, "content": _CONTENT},
        304: {"description": "The client's copy, whose ETag it sent in If-None-Match, is still valid."},
        **problems(401, 403, 404, 422, 429, 500, 503),
    },
    summary="Get a heatmap",
)
async def get_cam(
    request: Request,
    runtime: Running,
    id: PredictionId,
    options: Annotated[CamOptions, Query()],
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """An image that shows which positions support the class, or the contributions, whose sum is the score."""
    explanation = await _find(runtime, id, owner_of(request.scope))
    # A reload may have replaced the model of the heatmap by one with fewer classes.
    classes = max(len(runtime.manifest.classes), 1 + max(explanation.classes))
    place, versus = _places(explanation, options, classes)
    etag = f'"{hashlib.sha256(repr((id, place, versus, options)).encode()).hexdigest()[:32]}"'
    # The clock may have been changed since. A client must not keep an image longer than the service would.
    life_s = min(max(0, int(explanation.expires_at - time.time())), int(runtime.settings.cam_ttl_s))
    headers = {"ETag": etag, "Cache-Control": f"private, max-age={life_s}, immutable"}
    if if_none_match and _matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)

    def draw() -> tuple[bytes, float]:
        started = time.perf_counter()
        return _body(explanation, place, versus, options), time.perf_counter() - started

    body, render_s = await while_connected(request, runtime.draw(client_address(request.scope), draw))
    runtime.metrics.stage_seconds.labels("render").observe(render_s)
    headers["Server-Timing"] = server_timing({"render": render_s})
    return Response(body, headers=headers, media_type=_MEDIA_TYPES[options.format])


@router.delete(
    "/cam/{id}",
    dependencies=[needs("cam")],
    status_code=204,
    response_class=Response,
    response_description="Deleted.",
    responses=problems(401, 403, 404, 422, 429, 500, 503),
    summary="Delete a heatmap",
)
async def delete_cam(request: Request, runtime: Running, id: PredictionId) -> Response:
    """Deletes all heatmaps of a prediction from the service. Clients may still have copies in their caches."""
    await _find(runtime, id, owner_of(request.scope))
    try:
        deleted = await runtime.store.delete(id)
    except Exception as error:  # of any store; the client must not assume that the heatmap is deleted
        runtime.metrics.store_failures.labels("delete").inc()
        log.error("could not delete a heatmap: %s", error)
        raise Problem("internal", "the heatmap could not be deleted; try again") from None
    if not deleted:  # another request has deleted it
        raise _lost(runtime)
    return Response(status_code=204)


async def _find(runtime: Runtime, id: str, owner: str | None) -> Explanation:
    """The explanation `id`, if it belongs to `owner`."""
    data = None
    if is_id(id):
        try:
            data = await runtime.store.get(id)
        except Exception as error:  # of any store; for the client the heatmap is lost
            log.warning("could not read a heatmap: %s", error)
            runtime.metrics.store_failures.labels("get").inc()
    runtime.metrics.store_reads.labels("hit" if data else "miss").inc()
    if data is None:
        raise _lost(runtime)
    explanation = Explanation.unpack(data)
    if explanation.owner != owner:  # the same response, which does not reveal whether the id exists
        raise _lost(runtime)
    return explanation


def _lost(runtime: Runtime) -> Problem:
    reasons = (
        f"it has expired after {runtime.settings.cam_ttl_s:g} s (CAMCAL_CAM_TTL_S), or newer heatmaps have replaced it "
        "(CAMCAL_CAM_MAX_BYTES)"
    )
    return Problem("not-found", f"no heatmap has this id, or {reasons}; predict again")


def _places(explanation: Explanation, options: CamOptions, classes: int) -> tuple[int, int | None]:
    """The places of `class` and `versus` among the stored maps."""
    place = 0 if options.class_ is None else _place(explanation, "class", options.class_, classes)
    versus = None if options.versus is None else _place(explanation, "versus", options.versus, classes)
    if place == versus:
        label = explanation.labels[place]
        raise bad_parameter("versus", f"versus is {label!r}, the same class as shown; choose another class")
    if options.legend and options.size < MIN_SIZE:
        raise bad_parameter("size", f"size is {options.size}; a legend needs at least {MIN_SIZE}")
    return place, versus


def _place(explanation: Explanation, name: str, wanted: str, classes: int) -> int:
    """The place of class `wanted` among the stored maps. A number below the number of classes is an index."""
    try:
        if is_index(wanted, classes):
            return explanation.classes.index(int(wanted))
        return explanation.labels.index(wanted)
    except ValueError:
        pairs = zip(explanation.classes, explanation.labels, strict=True)
        kept = ", ".join(f"{k} ({label})" for k, label in list(pairs)[:20])
        message = (
            f"{name} is {wanted[:100]!r}; this prediction has heatmaps of {kept}: "
            f"predict with a larger top_k or with cam_classes for more"
        )
        raise bad_parameter(name, message) from None


def _matches(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _body(explanation: Explanation, place: int, versus: int | None, options: CamOptions) -> bytes:
    contributions = explanation.contributions(place, options.calibrated, versus)
    if options.format == "json":
        return _numbers(explanation, place, versus, options.calibrated, contributions)
    if options.format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, contributions)
        return buffer.getvalue()
    signed = options.zero_in_the_middle
    scale = explanation.scale(place, options.calibrated, versus, signed=signed, common=options.scale == "image")
    view = View(
        size=options.size,
        colormap=options.colormap or (DEFAULT_SIGNED if signed else DEFAULT),
        alpha=options.alpha,
        overlay=options.overlay,
        format=options.format,
        window=explanation.window,
    )
    caption = explanation.caption(place, options.calibrated, versus) if options.legend else None
    return render(contributions, scale, explanation.picture, explanation.picture_size, view, caption)


def _numbers(
    explanation: Explanation, place: int, versus: int | None, calibrated: bool, contributions: NDArray[np.float32]
) -> bytes:
    body = {
        **_name(explanation, place),
        "calibrated": calibrated,
        "versus": None if versus is None else _name(explanation, versus),
        "contributions": contributions,
        "sum": float(contributions.sum(dtype=np.float64)),
        "score": explanation.score(place, calibrated, versus),
        "window": explanation.window or (0, 0, *contributions.shape[::-1]),
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _name(explanation: Explanation, place: int) -> dict[str, int | str]:
    return {"class_id": explanation.classes[place], "label": explanation.labels[place]}
