"""`GET /`, the web page, and `GET /docs`, the API documentation: static files that load nothing from other hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles

from camcal.service import http

router = APIRouter(include_in_schema=False)

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",  # heatmaps that the page fetches with its API key; icons of Swagger UI
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class _PageFiles(StaticFiles):
    """Static files with the page's headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


_FOLDER = Path(http.__file__).parent / "page"
_SWAGGER_UI = ("swagger-ui.css", "swagger-ui-bundle.js")
_FILES = _PageFiles(directory=_FOLDER, packages=[("fastapi_swagger", "resources")])


def _add_route(path: str, name: str) -> None:
    """Serve one file. A mount at `/` would answer the unknown paths and methods of all other routes."""

    @router.get(path)
    async def page(request: Request) -> Response:
        return await _FILES.get_response(name, request.scope)


for _name in sorted(file.relative_to(_FOLDER).as_posix() for file in _FOLDER.rglob("*.*")):
    _add_route({"index.html": "/", "docs/index.html": "/docs"}.get(_name, f"/{_name}"), _name)
for _name in _SWAGGER_UI:
    _add_route(f"/docs/{_name}", _name)
