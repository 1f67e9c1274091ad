"""`GET /`: the web page, three small files that load nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

import service

router = APIRouter(include_in_schema=False)

_FOLDER = Path(service.__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# blob: and data: are the pictures that the page itself makes.
_POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def _serve(path: str, name: str, media_type: str) -> None:
    content = (_FOLDER / name).read_bytes()

    @router.get(path)
    async def page() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)


for path, (name, media_type) in _FILES.items():
    _serve(path, name, media_type)
