"""`GET /`: the web page, a few static files that load nothing from other hosts."""

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
        "img-src 'self' blob:",  # blob: images that the page fetches with its API key
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
_FILES = _PageFiles(directory=_FOLDER)


def _add_route(name: str) -> None:
    """Serve one file. A mount at `/` would answer the unknown paths and methods of all other routes."""

    @router.get("/" if name == "index.html" else f"/{name}")
    async def page(request: Request) -> Response:
        return await _FILES.get_response(name, request.scope)


for _file in sorted(_FOLDER.rglob("*.*")):
    _add_route(_file.relative_to(_FOLDER).as_posix())
