"""`GET /`: the web page, a few small files that load nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from camcal.service import http

router = APIRouter(include_in_schema=False)

_FOLDER = Path(http.__file__).parent / "page"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob:",  # blob: the pictures that the page fetches with its key
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


def _serve(file: Path) -> None:
    content = file.read_bytes()
    name = file.relative_to(_FOLDER).as_posix()

    @router.api_route("/" if name == "index.html" else f"/{name}", methods=["GET", "HEAD"])
    async def page() -> Response:
        return Response(content, headers=_HEADERS, media_type=_MEDIA_TYPES[file.suffix])


for _file in sorted(_FOLDER.rglob("*.*")):
    _serve(_file)
