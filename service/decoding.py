"""From the bytes of an image file to the pixels a network sees. Every fault of the bytes is one of three errors."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from models.preprocessing import Preprocessing, to_rgb, turn_of

Data = bytes | bytearray | memoryview
Hold = Callable[[int], AbstractContextManager[None]]

ACCEPTED = "JPEG, PNG, WebP, GIF or BMP"
PICTURE_SIDE = 512  # longest side of the picture kept beside a heatmap, in px
AS_IT_CAME_SIDE = 640  # a JPEG file up to this size, in px
AS_IT_CAME_BYTES = 128 * 1024  # and this one is kept as the picture itself, which costs no time

# A JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves so many pixels for each that the network sees. At 2, the best
# class stayed the same for all but the share of photographs that docs/serving.md gives.
OVERSAMPLING = 2
# At most, while a picture is decoded: a JPEG as libjpeg and as Pillow keep it; others with alpha, a copy on white, a
# mask. A JPEG of several scans has all its coefficients in memory, of the full size however small it is decoded.
JPEG_BYTES, COEFFICIENT_BYTES, OTHER_BYTES = 12, 6, 20  # a pixel

# Each scan of a JPEG goes over the whole picture, even one of ten bytes. Encoders write about ten.
SCANS = 64  # of a picture of as many pixels as are allowed; a smaller one may have more
SEGMENTS = 2000  # of the file; Pillow keeps a list of them
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # what else follows 0xff has no length, or is a scan's data
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_SCAN = re.compile(_START_OF_SCAN)

# The limits below are ours and exact; Pillow's own warnings (size, odd EXIF) would only reach the operator's log.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnsupportedFormatError(ValueError):
    """The bytes are not of an accepted image format."""


class UndecodableImageError(ValueError):
    """The bytes begin like an image, but no picture comes out of them."""


class ImageTooLargeError(ValueError):
    """The file has too many bytes, or the picture too many pixels."""


class NoRoomError(RuntimeError):
    """There is no memory now for the `nbytes` that decoding takes."""

    def __init__(self, nbytes: int):
        super().__init__(f"there is no room for {nbytes} bytes")
        self.nbytes = nbytes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest file, in bytes, and the largest picture, in pixels, that are decoded."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A picture ready for the network."""

    pixels: NDArray[np.uint8]  # input_size × input_size × 3, RGB
    width: int  # of the upright picture, px
    height: int
    picture: bytes  # the part that the network sees, in its true shape, as a JPEG; empty when not asked for
    picture_size: tuple[int, int]  # its width and height, px


# The plug-ins are called directly: `Image.open` checks the size only after opening, and against Pillow's limit.
_FORMATS: list[tuple[Callable[[bytes], bool], Callable[[io.BytesIO], ImageFile.ImageFile]]] = [
    (lambda head: head.startswith(b"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    (lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    (lambda head: head.startswith(b"BM"), BmpImagePlugin.BmpImageFile),
]

_SAME_SIDES = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)


def decode(
    data: Data,
    preprocessing: Preprocessing,
    limits: Limits,
    *,
    picture: bool = True,
    hold: Hold = lambda nbytes: nullcontext(),
) -> Decoded:
    """Decode one image file: the first frame, upright, on white, RGB; then resize and crop.

    Args:
        data: the file.
        preprocessing: the network's rule.
        limits: checked from the file's header, before any pixel is decoded.
        picture: whether to keep a small JPEG of what the network sees.
        hold: told how many bytes the decoding takes at most; held while it goes on. It may raise NoRoomError.

    Raises:
        UnsupportedFormatError: if the bytes begin like none of the accepted formats.
        ImageTooLargeError: if the file or the picture exceeds `limits`.
        UndecodableImageError: if the bytes are damaged, truncated or empty.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"the image has {len(data)} bytes; the limit is {limits.max_bytes} (CAMCAL_MAX_BYTES)")
    plugin = _sniff(bytes(data[:16]))
    scans = _scans(data) if plugin is JpegImagePlugin.JpegImageFile else 1
    try:
        with plugin(io.BytesIO(data)) as image:
            _check_pixels(*image.size, limits.max_pixels)
            if scans * image.width * image.height > SCANS * limits.max_pixels:
                raise ImageTooLargeError(f"the image has {scans} scans of {image.width}×{image.height} px: too many")
            shrink = _shrink(image, preprocessing, picture)
            with hold(_memory(image, shrink, scans)):
                return _decode(data, image, shrink, preprocessing, picture)
    except (ImageTooLargeError, NoRoomError):
        raise
    except Image.DecompressionBombError:
        raise ImageTooLargeError(
            f"the image has too many pixels; the limit is {limits.max_pixels} (CAMCAL_MAX_PIXELS)"
        ) from None
    except Exception as error:  # damaged files make Pillow raise nearly anything, from OSError to struct.error
        raise UndecodableImageError(f"the image is damaged or truncated: {_reason(error)}") from None


def _scans(data: Data) -> int:
    """How many scans a JPEG file has.

    Raises:
        UndecodableImageError: if it is made of more than `SEGMENTS` parts.
    """
    scans, place = 0, 2
    for _ in range(SEGMENTS):
        found = _MARKER.search(data, place)
        if found is None or found[0] == _END_OF_IMAGE:
            return scans
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
        if found[0] == _START_OF_SCAN:
            scans += 1
            if not _SCAN.search(data, place):  # as nearly always, and quicker
                return scans
    raise UndecodableImageError(f"the image is damaged: it has more than {SEGMENTS} segments")


def _memory(image: ImageFile.ImageFile, shrink: int, scans: int) -> int:
    """Bytes that decoding takes at most."""
    pixels = image.width * image.height
    if image.format != "JPEG":
        return OTHER_BYTES * pixels
    coefficients = COEFFICIENT_BYTES * pixels if scans > 1 or "progressive" in image.info else 0
    return JPEG_BYTES * pixels // shrink**2 + coefficients


def _decode(
    data: Data, image: ImageFile.ImageFile, shrink: int, preprocessing: Preprocessing, picture: bool
) -> Decoded:
    width, height = image.size
    turn = turn_of(image)
    rgb = _jpeg(data, image, shrink) or to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
        width, height = (width, height) if turn in _SAME_SIDES else (height, width)
    kept, size = b"", (0, 0)
    if picture:
        as_it_came = shrink == 1 and turn is None and _is_small_jpeg(data, image) and _is_whole(rgb, preprocessing)
        kept, size = (bytes(data), rgb.size) if as_it_came else _picture(rgb, preprocessing)
    return Decoded(pixels=preprocessing.apply(rgb), width=width, height=height, picture=kept, picture_size=size)


def _sniff(head: bytes) -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    for matches, plugin in _FORMATS:
        if matches(head):
            return plugin
    raise UnsupportedFormatError(f"the file begins with the bytes {head[:8].hex(' ')}; expected a {ACCEPTED} image")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        limit = f"{max_pixels / 1e6:g} Mpx (CAMCAL_MAX_PIXELS)"
        raise ImageTooLargeError(f"the image is {width}×{height} px; the limit is {limit}")


def _reason(error: Exception) -> str:
    # Only Pillow's sentences for people; a KeyError or struct.error of its parser says nothing to them.
    return str(error) if isinstance(error, OSError) and error.errno is None and str(error) else "no picture in it"


def _shrink(image: ImageFile.ImageFile, preprocessing: Preprocessing, picture: bool) -> int:
    """The largest of 1, 2, 4, 8 by which a JPEG may be shrunk without harm to the network's input or the picture."""
    if image.format != "JPEG":
        return 1
    left, top, right, bottom = preprocessing.box(*image.size)
    sides = right - left, bottom - top
    room = min(sides) / (OVERSAMPLING * preprocessing.input_size)
    if picture:
        room = min(room, max(sides) / PICTURE_SIDE)
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def _jpeg(data: Data, image: ImageFile.ImageFile, shrink: int) -> Image.Image | None:
    """A grey or RGB JPEG as RGB, by libjpeg-turbo's own interface; None for what Pillow should see to.

    At full size it is bit for bit what Pillow decodes, in about 0.7 of the time.
    """
    if image.format != "JPEG":
        return None
    full, size = image.size, (-(-image.width // shrink), -(-image.height // shrink))
    if shrink > 1:
        image.draft(None, size)  # should Pillow have to decode it, then no larger than was reckoned with
    if image.mode not in ("L", "RGB"):
        return None
    try:
        # Pillow goes by the last header in the file, libjpeg-turbo by the first: only where they agree.
        if simplejpeg.decode_jpeg_header(data)[1::-1] != full:
            return None
        pixels = simplejpeg.decode_jpeg(data, min_width=size[0], min_height=size[1], min_factor=shrink)
    except ValueError:  # damaged; Pillow is more patient, and says what is wrong
        return None
    return Image.fromarray(pixels)


def _is_small_jpeg(data: Data, image: ImageFile.ImageFile) -> bool:
    small = max(image.size) <= AS_IT_CAME_SIDE and len(data) <= AS_IT_CAME_BYTES
    return small and image.format == "JPEG" and image.mode in ("L", "RGB")


def _is_whole(rgb: Image.Image, preprocessing: Preprocessing) -> bool:
    """Whether the network sees all of the picture."""
    return preprocessing.box(*rgb.size) == (0, 0, *rgb.size)


def _picture(rgb: Image.Image, preprocessing: Preprocessing) -> tuple[bytes, tuple[int, int]]:
    """A JPEG of what the network sees, in its true shape, with the longest side at most `PICTURE_SIDE`."""
    left, top, right, bottom = preprocessing.box(*rgb.size)
    shrink = min(1.0, PICTURE_SIDE / max(right - left, bottom - top))
    size = (max(1, round((right - left) * shrink)), max(1, round((bottom - top) * shrink)))
    small = rgb.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom), reducing_gap=2.0)
    small.info.clear()  # Pillow would write the comment, or refuse one of more than 64 kB
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), size
