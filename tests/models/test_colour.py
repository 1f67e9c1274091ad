from __future__ import annotations

import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from camcal.models.colour import cmyk_to_srgb, is_srgb, to_srgb

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# The colourants of Display P3 (DCI-P3 primaries, D65 adapted to D50), as Apple's profile has them.
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])


def display_p3() -> bytes:
    """sRGB's profile with the colourants of Display P3; the curve is the same."""
    profile = bytearray(SRGB)
    (count,) = struct.unpack_from(">I", profile, 128)
    offsets = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    for name, colourant in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3, strict=True):
        (offset,) = struct.unpack_from(">I", profile, offsets[name] + 4)
        struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in colourant))
    return bytes(profile)


def colours() -> NDArray[np.uint8]:
    levels = np.arange(40, 216, 25, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(8, -1, 3)


def linear(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def test_display_p3_becomes_srgb() -> None:
    srgb_to_xyz = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
    expected = 255 * encoded(linear(colours() / 255) @ P3 @ np.linalg.inv(srgb_to_xyz))
    found = np.asarray(to_srgb(Image.fromarray(colours()), display_p3())).astype(float)
    assert np.abs(found - expected).max() <= 3
    assert np.abs(found - colours()).max() > 20  # it is not the same
    assert not is_srgb(display_p3())


@pytest.mark.parametrize("profile", [b"", SRGB, b"no profile at all", SRGB[:200], display_p3()[:300]])
def test_srgb_and_damaged_profiles_change_nothing(profile: bytes) -> None:
    image = Image.fromarray(colours())
    assert to_srgb(image, profile) is image
    assert is_srgb(profile)


def test_profile_of_other_colours_than_the_picture_changes_nothing() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.fromarray(colours())
    assert to_srgb(image, lab) is image
    cmyk = Image.new("CMYK", (4, 4), (0, 100, 200, 10))
    for profile in (b"", SRGB):
        np.testing.assert_array_equal(cmyk_to_srgb(cmyk, profile), cmyk.convert("RGB"))
