"""Colours of an embedded ICC profile as sRGB, which is what networks are trained on and browsers show without one.

Profiles are applied to the small picture that the network sees, not to every pixel of the file: most photographs carry
none, or sRGB itself, and cost nothing here.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

CACHED = 32  # profiles; a camera or a program writes the same one into all its pictures
_SAME = 1  # grey levels that sRGB may be off by before a profile counts as another one
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of the profile → mode of its pictures


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB picture whose values are those of `profile`, in sRGB; a grey one has three equal channels.

    A profile that is damaged, that is sRGB, or that is of other colours than the picture changes nothing.
    """
    transform = _transform(profile) if profile else None
    if transform is None or transform.input_mode == "CMYK":
        return image
    return _applied(transform, image if transform.input_mode == "RGB" else image.getchannel(0))


def is_srgb(profile: bytes) -> bool:
    """Whether there is nothing to convert."""
    return not profile or _transform(profile) is None


def cmyk_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A CMYK picture as RGB: by its profile, or without one by subtracting each ink from white."""
    transform = _transform(profile) if profile else None
    if transform is None or transform.input_mode != "CMYK":
        return image.convert("RGB")
    return _applied(transform, image)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it would be None had it been done in place
    converted.info.clear()
    return converted


@functools.lru_cache(CACHED)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """What makes sRGB of the profile's colours; None where nothing needs to be done, or nothing can be."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if mode == "RGB" and _changes_nothing(transform) else transform
    except (ImageCms.PyCMSError, OSError, KeyError, TypeError, ValueError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    converted = np.asarray(_applied(transform, Image.fromarray(colours)))
    return bool(np.abs(converted.astype(int) - colours).max() <= _SAME)
