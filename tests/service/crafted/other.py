"""Files of other kinds, of two kinds at once, and cut ones of every accepted format."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

from tests.service.crafted import bmp, gif, jpeg, png, webp
from tests.service.crafted.seeds import SEEDS


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", "text")
    return buffer.getvalue()


def cut(build: Callable[[], bytes], share: float) -> Callable[[], bytes]:
    def shorter() -> bytes:
        whole = build()
        return whole[: max(1, min(len(whole) - 1, int(len(whole) * share)))]

    return shorter


SCRIPT = b"<script>alert(1)</script>"

CASES: dict[str, Callable[[], bytes]] = {
    # Pictures that are something else as well.
    "picture-and-archive.jpg": lambda: jpeg.plain() + archive(),
    "picture-and-picture.png": lambda: png.small() + jpeg.plain(),
    "script-in-comment.gif": lambda: gif.gif(8, 8, gif.comment(gif.blocks(SCRIPT)), gif.frame(8, 8)),
    "script-in-text.png": lambda: png.small(png.chunk(b"tEXt", b"Title\0" + SCRIPT)),
    "script-in-size.gif": lambda: b"GIF89a/*" + gif.gif(8, 8, gif.frame(8, 8))[8:] + b"*/=1;alert(1)",
    "script-in-comment.jpg": lambda: jpeg.with_segments(jpeg.segment(jpeg.COM, SCRIPT)),
    "jpeg-in-png.png": lambda: png.small(data=png.chunk(b"IDAT", jpeg.plain())),
    "png-in-jpeg.jpg": lambda: jpeg.with_segments(jpeg.segment(jpeg.APP2, png.small())),
    "text-that-begins-like.bmp": lambda: b"BMW is a maker of cars, and this is a text about it.\n" * 20,
    "padded.bmp": lambda: bmp.os2() + bytes(19_000_000),
    # Other kinds of file.
    "empty": lambda: b"",
    "one-byte": lambda: b"\xff",
    "zeros": lambda: bytes(1_000_000),
    "drawing.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "page.html": lambda: b"<!doctype html>" + SCRIPT,
    "archive.zip": archive,
    "picture.tiff": lambda: b"II*\0\x08\0\0\0" + bytes(100),
    "picture.heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "picture.avif": lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(100),
    "picture.jp2": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
    "script.eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999999 9999999\n",
    "picture.ico": lambda: b"\0\0\1\0\1\0" + bytes(100),
    # Signatures alone.
    "signature.png": lambda: png.SIGNATURE,
    "signature.jpg": lambda: b"\xff\xd8\xff\xe0",
    "signature.gif": lambda: b"GIF89a",
    "signature.webp": lambda: webp.webp()[:12],
    "signature.bmp": lambda: b"BM",
}
for _name, _seed in SEEDS.items():
    for _share in (0.1, 0.5, 0.999):
        CASES[f"cut-at-{_share:g}-{_name}"] = cut(_seed, _share)
