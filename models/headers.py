"""What the header of an image file says, read without decoding a pixel and in bounded time, whatever the bytes are.

Pillow reads headers in Python, one marker, chunk or block at a time, and keeps all it meets: a crafted file of some
kilobytes can hold it up for seconds, or make it take memory nobody reckoned with. So size, number of scans and number
of parts are counted here first. A file that is not ordinary in this respect is marked `odd`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Data = bytes | bytearray | memoryview
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]

ACCEPTED = "JPEG, PNG, WebP, GIF or BMP"
MAX_SIDE = 65_535  # px, which no JPEG, GIF or WebP can exceed
PARTS = 2000  # segments of a JPEG, chunks of a PNG, blocks of a GIF before its picture;
MAX_SCANS = 100  # of a JPEG: encoders write about ten
PART_BYTES = 4096  # of a PNG, one more for so many bytes
TEXTS = 64  # chunks of text in an ordinary PNG: each may unpack to a megabyte
JUNK_BYTES = 65_536  # between the segments of a JPEG
BESIDE_BYTES = 2**20  # in the segments of an ordinary JPEG, beside the picture itself
PROFILE_BYTES = 16_384  # of an ordinary colour profile: a matrix and curves; larger ones hold tables,
MAX_PROFILE_BYTES = 4 * 2**20  # and what is larger than this is ignored

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")  # what else follows 0xff has no length, or is a scan's data
_SCAN = re.compile(rb"\xff\xda")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2,)  # the others are arithmetic, lossless or hierarchical
_EXIF, _PROFILE = b"Exif\0\0", b"ICC_PROFILE\0"


class UnsupportedFormatError(ValueError):
    """The bytes are not of an accepted image format."""


class UndecodableImageError(ValueError):
    """The bytes begin like an image, but no picture comes out of them."""


class ImageTooLargeError(ValueError):
    """The file has too many bytes, or the picture too many pixels, or decoding it takes too much time or memory."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of one image file.

    width, height: as stored, before EXIF turns the picture, in px.
    channels: samples per pixel, where the header says so; an index into a palette counts as one.
    depth: bits of a sample.
    scans: passes over the whole picture that decoding makes.
    progressive: whether a JPEG's coefficients are kept for the whole picture.
    odd: whether the file is built in a way that no camera, browser or program writes.
    exif, profile: the blocks of that name of a JPEG; Pillow gives those of other formats.
    """

    format: Format
    width: int
    height: int
    channels: int = 3
    depth: int = 8
    scans: int = 1
    progressive: bool = False
    odd: bool = False
    exif: bytes = field(default=b"", repr=False)
    profile: bytes = field(default=b"", repr=False)

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the picture when its EXIF block, as far as it is known here, has turned it."""
        return (self.height, self.width) if orientation(self.exif) > 4 else (self.width, self.height)


def read_header(data: Data) -> Header:
    """The header of the image file `data`.

    Raises:
        UnsupportedFormatError: if the bytes begin like none of the accepted formats, or are a run-length encoded BMP.
        ImageTooLargeError: if a side is longer than 65,535 px, or a JPEG has more than 100 scans.
        UndecodableImageError: if the header is damaged or cut off, or there is none.
    """
    head = bytes(data[:16])
    read = next((read for matches, read in _READERS if matches(head)), None)
    if read is None:
        raise UnsupportedFormatError(f"the file begins with the bytes {head[:8].hex(' ')}; expected a {ACCEPTED} image")
    try:
        header = read(data)
    except (struct.error, IndexError):
        raise UndecodableImageError("the image is damaged or truncated: its header is incomplete") from None
    if not header.pixels:
        raise UndecodableImageError(f"the image is damaged: its size is {header.width}×{header.height} px")
    if max(header.width, header.height) > MAX_SIDE:
        raise ImageTooLargeError(f"the image is {header.width}×{header.height} px; a side may have {MAX_SIDE} at most")
    return header


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the block says nothing that can be understood.

    Only that entry is read. Pillow would read them all, and a block of 64 KB may point to some hundred megabytes.
    """
    tiff = exif.removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for place in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, place)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _jpeg(data: Data) -> Header:
    frames: list[tuple[int, ...]] = []
    parts: list[memoryview] = []
    exif, scans, beside = b"", 0, 0
    for marker, segment in _segments(memoryview(data)):
        beside += len(segment)
        if marker in _FRAMES:
            frames.append((marker, *struct.unpack_from(">BHHB", segment)))
        elif marker == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise ImageTooLargeError(f"the image has more than {MAX_SCANS} scans")
        elif marker == 0xE1 and segment[:6] == _EXIF and not exif:
            exif = bytes(segment)
        elif marker == 0xE2 and segment[:12] == _PROFILE:
            parts.append(segment[12:])
    if not frames:
        raise UndecodableImageError("the image is damaged or truncated: no picture in it")
    marker, precision, height, width, channels = frames[0]
    ordinary = len(frames) == 1 and marker in _SEQUENTIAL + _PROGRESSIVE and precision == 8 and channels in (1, 3)
    profile = _joined(parts)
    ordinary &= beside <= BESIDE_BYTES and len(profile) <= PROFILE_BYTES
    return Header(
        format="JPEG",
        width=width,
        height=height,
        channels=channels,
        scans=scans,
        progressive=marker not in _SEQUENTIAL or scans > 1,
        odd=not ordinary,
        exif=exif,
        profile=profile,
    )


def _joined(parts: list[memoryview]) -> bytes:
    """A profile in parts that begin with their number and how many there are; empty if it is incomplete or too long."""
    ordered = sorted(parts, key=lambda part: part[0] if part else 0)
    complete = bool(ordered) and ordered[0][1:2] == bytes([len(ordered) & 255])
    return b"".join(part[2:] for part in ordered) if complete and sum(map(len, parts)) <= MAX_PROFILE_BYTES else b""


def _segments(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Marker and content of each segment of a JPEG, to the last scan."""
    place, junk, scanned = 2, 0, False
    for _ in range(PARTS):
        end = len(data) if scanned else min(len(data), place + JUNK_BYTES - junk)
        found = _MARKER.search(data, place, end)
        if found is None and end < len(data):
            raise UndecodableImageError(f"the image is damaged: it has {JUNK_BYTES} bytes that are of no segment")
        if found is None or found[1][0] == _END_OF_IMAGE:
            return
        junk += 0 if scanned else found.start() - place
        marker, start = found[1][0], found.end()
        place = start + int.from_bytes(data[start : start + 2])
        yield marker, data[start + 2 : place]
        if marker == _START_OF_SCAN:
            scanned = True
            if not _SCAN.search(data, place):  # as nearly always
                return
    raise UndecodableImageError(f"the image is damaged: it has more than {PARTS} segments")


def _png(data: Data) -> Header:
    name, width, height, depth, kind = struct.unpack_from(">4sIIBB", data, 12)
    if name != b"IHDR":
        raise UndecodableImageError("the image is damaged: a PNG begins with the chunk IHDR")
    at, texts = 8, 0
    for _ in range(PARTS + len(data) // PART_BYTES):
        if at + 8 > len(data) or name == b"IEND":
            break
        size, name = struct.unpack_from(">I4s", data, at)
        texts += name in (b"tEXt", b"zTXt", b"iTXt")
        at += 12 + size
    else:
        raise UndecodableImageError("the image is damaged: its chunks are too many for its size")
    channels = {0: 1, 2: 3, 3: 1, 4: 2}.get(kind, 4)
    return Header(format="PNG", width=width, height=height, channels=channels, depth=max(depth, 1), odd=texts > TEXTS)


def _webp(data: Data) -> Header:
    chunk = bytes(data[12:16])
    if chunk == b"VP8X":
        flags, *sides = struct.unpack_from("<B3xHBHB", data, 20)
        width, height = (1 + low + (high << 16) for low, high in (sides[:2], sides[2:]))
        return Header(format="WEBP", width=width, height=height, channels=4 if flags & 16 else 3)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header(format="WEBP", width=(bits & 0x3FFF) + 1, height=(bits >> 14 & 0x3FFF) + 1, channels=4)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header(format="WEBP", width=width & 0x3FFF, height=height & 0x3FFF)
    raise UndecodableImageError("the image is damaged: a WebP begins with the chunk VP8, VP8L or VP8X")


def _gif(data: Data) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, inside = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0), False
    for _ in range(PARTS):
        kind = data[at]
        if inside:  # an extension, in blocks that begin with their length
            at += 1 + kind
            inside = kind > 0
        elif kind == 0x2C:  # the first picture, which may be smaller than the screen, or reach beyond it
            left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
            return Header(format="GIF", width=max(width, left + across), height=max(height, top + down), channels=1)
        elif kind == 0x3B:
            break
        else:
            inside = kind == 0x21
            at += 2 if inside else 1
    raise UndecodableImageError(f"the image is damaged or truncated: no picture within its first {PARTS} blocks")


def _bmp(data: Data) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = colours = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<IiHHI", data, 18)
        (colours,) = struct.unpack_from("<I", data, 46)
    if compression in (1, 2):
        raise UnsupportedFormatError(
            "the image is a run-length encoded BMP; save it as PNG, or as BMP without encoding"
        )
    channels = 1 if bits <= 8 else 3 if bits < 32 else 4
    return Header(format="BMP", width=width, height=abs(height), channels=channels, odd=colours > 256)


_READERS: list[tuple[Callable[[bytes], bool], Callable[[Data], Header]]] = [
    (lambda head: head.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), _png),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", _webp),
    (lambda head: head.startswith((b"GIF87a", b"GIF89a")), _gif),
    (lambda head: head.startswith(b"BM"), _bmp),
]
