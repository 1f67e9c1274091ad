"""From an image file to the picture that people see, the same in training and serving.

That is its first frame, upright, on white, in RGB.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from camcal.models.colour import cmyk_to_srgb, is_srgb, to_srgb
from camcal.models.headers import (
    Data,
    Format,
    Header,
    ImageTooLargeError,
    UndecodableImageError,
    orientation,
    read_header,
)
from camcal.models.preprocessing import Preprocessing

STRIP_PIXELS = 2**18  # converted at a time, so that no third copy of a large picture is made

_TURNS = {  # EXIF orientation → what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The plug-ins are called directly: `Image.open` checks the size only after opening, and against Pillow's own limit.
_PLUGINS: dict[Format, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}

# Limits are checked by the header; Pillow's own warnings (size, odd EXIF) would only reach the operator's log.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnusualJpegError(ValueError):
    """libjpeg-turbo's interface does not take this JPEG; Pillow, which is slower and more patient, may."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An upright RGB picture, perhaps at a reduced scale, with the values that its file has.

    profile: the ICC profile that says which colours these values are; empty for sRGB.
    turned: whether it was turned to be upright.
    """

    rgb: Image.Image
    profile: bytes
    turned: bool

    @property
    def altered(self) -> bool:
        """Whether the file shows something else to a program that ignores its EXIF block and profile."""
        return self.turned or not is_srgb(self.profile)

    def resized(
        self,
        size: tuple[int, int],
        box: tuple[float, float, float, float],
        resampling: Image.Resampling = Image.Resampling.BILINEAR,
        reducing_gap: float | None = None,
    ) -> Image.Image:
        """A part of the picture, in pixels of `rgb`, at another size and in sRGB.

        Colours are converted after resizing: most pictures have none to convert, and the others fewer pixels.
        """
        part = self.rgb.resize(size, resampling, box=box, reducing_gap=reducing_gap)
        return to_srgb(part, self.profile)

    def pixels(self, preprocessing: Preprocessing, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """What the network sees: sRGB, uint8, input_size×input_size×3.

        Args:
            preprocessing: the resize and crop rule of the network.
            size: width and height of the picture if it was decoded at a reduced scale.
        """
        return preprocessing.apply(self.rgb, size, self.profile)


def read_picture(data: Data, header: Header, shrink: int = 1, *, patient: bool = True) -> Picture:
    """Decode the first frame of an image file.

    Args:
        data: the file.
        header: of the file, which the caller has found small enough.
        shrink: 1, 2, 4 or 8: by how much a JPEG is reduced while it is decoded.
        patient: whether Pillow is asked for a JPEG that is unusual or damaged.

    Raises:
        UndecodableImageError: if the bytes are damaged or truncated.
        ImageTooLargeError: if the picture is larger than its header says, by Pillow's limit.
        UnusualJpegError: for such a JPEG, unless `patient`.
    """
    try:
        if header.format == "JPEG":
            return _jpeg(data, header, shrink, patient)
        return _upright(*_opened(data, header))
    except (UnusualJpegError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ImageTooLargeError("the image has too many pixels") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything, from OSError to struct.error
        raise UndecodableImageError(f"the image is damaged or truncated: {_reason(error)}") from None


def read_file(path: Path) -> Picture:
    """The picture in a file of any size, at full scale.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no image, or a damaged one, as `read_header` and `read_picture` have it.
    """
    data = path.read_bytes()
    return read_picture(data, read_header(data))


def to_rgb(image: Image.Image, profile: bytes = b"") -> Image.Image:
    """Any mode to RGB: 16-bit grey scaled to 8 bits, transparency laid on white, CMYK by its profile."""
    image.load()
    if image.mode.startswith("I"):
        return _by_strips(image, _from_16_bits)
    if image.has_transparency_data:
        return _by_strips(image, lambda strip: strip.convert("RGBA"))
    if image.mode == "CMYK":
        return _by_strips(image, lambda strip: cmyk_to_srgb(strip, profile))
    return image if image.mode == "RGB" else image.convert("RGB")


def _jpeg(data: Data, header: Header, shrink: int, patient: bool) -> Picture:
    try:
        if header.odd:
            raise UnusualJpegError("the JPEG is unusual")
        return _upright(_by_turbo(data, header, shrink), header.exif, header.profile)
    except UnusualJpegError:
        if not patient:
            raise
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        image.draft(None, (-(-image.width // shrink), -(-image.height // shrink)))
        cmyk = image.mode == "CMYK"
        return _upright(to_rgb(image, header.profile), header.exif, b"" if cmyk else header.profile)


def _by_turbo(data: Data, header: Header, shrink: int) -> Image.Image:
    """By libjpeg-turbo's own interface: at full size bit for bit what Pillow decodes, in about 0.7 of the time."""
    width, height = -(-header.width // shrink), -(-header.height // shrink)
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (header.height, header.width):
            raise UnusualJpegError("the JPEG has two sizes")
        pixels = simplejpeg.decode_jpeg(data, min_width=width, min_height=height, min_factor=shrink)
    except ValueError as error:  # it does not take warnings for less than errors
        raise UnusualJpegError(str(error)) from None
    return Image.fromarray(pixels)


def _upright(rgb: Image.Image, exif: bytes, profile: bytes) -> Picture:
    turn = _TURNS.get(orientation(exif))
    return Picture(rgb=rgb if turn is None else rgb.transpose(turn), profile=profile, turned=turn is not None)


def _opened(data: Data, header: Header) -> tuple[Image.Image, bytes, bytes]:
    """The first frame of a file that is no JPEG, its EXIF block and its profile."""
    with _PLUGINS[header.format](io.BytesIO(data)) as image:
        box = image.tile[0].extents if header.format == "GIF" and image.tile else None
        rgb = to_rgb(image)
        if box is not None:
            _clear_around(rgb, box)
        profile = b"" if "srgb" in image.info else image.info.get("icc_profile")
        return rgb, image.info.get("exif") or b"", profile or b""


def _clear_around(rgb: Image.Image, box: tuple[int, int, int, int]) -> None:
    """White where a GIF's first frame is not, as in browsers; Pillow has the first colour of its palette there."""
    left, top, right, bottom = box
    width, height = rgb.size
    for around in ((0, 0, width, top), (0, bottom, width, height), (0, top, left, bottom), (right, top, width, bottom)):
        rgb.paste((255, 255, 255), around)


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` applied to a few lines at a time, and laid on white where the result has transparency."""
    whole = Image.new("RGB", image.size, "white")
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        strip = convert(image.crop((0, top, image.width, min(top + height, image.height))))
        whole.paste(strip, (0, top), mask=strip if strip.mode == "RGBA" else None)
    return whole


def _from_16_bits(strip: Image.Image) -> Image.Image:
    values = np.asarray(strip)
    grey = (values >> 8).clip(0, 255).astype(np.uint8)
    if (transparent := strip.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _reason(error: Exception) -> str:
    # Only Pillow's sentences for people; a KeyError or struct.error of its parser says nothing to them.
    return str(error) if isinstance(error, OSError) and error.errno is None and str(error) else "no picture in it"
