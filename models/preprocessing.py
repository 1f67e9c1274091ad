"""From a picture of any size to a network's input, the same in training and serving."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from camcal.models.colour import to_srgb

Rgb = tuple[float, float, float]


class Preprocessing(BaseModel):
    """How a picture of any size becomes the network's input.

    `crop` resizes the short side to `resize` pixels and crops the central square; `stretch` resizes both sides to
    `resize`, so that nothing of the picture is lost. Then the central `input_size` square is taken. `letterbox` resizes
    the long side to `input_size`, which `resize` must equal, and lays the picture in the middle of a square of the mean
    colour: nothing is lost, and the ratio is kept. `mean` and `std` are per channel, for values in [0, 1]; the exported
    graph applies them, not the caller.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fit: Literal["crop", "stretch", "letterbox"]
    resize: int = Field(ge=1, le=4096)
    input_size: int = Field(ge=1, le=4096)
    mean: Rgb
    std: Rgb
    # Left out of a manifest where it is bilinear, which older servers assume.
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", exclude_if=lambda found: found == "bilinear"
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocessing:
        if self.input_size > self.resize:
            raise ValueError(f"input_size {self.input_size} is larger than resize {self.resize}")
        if self.fit == "letterbox" and self.input_size < self.resize:
            raise ValueError(
                f"letterbox shows the whole picture: input_size must be resize, got {self.input_size} and {self.resize}"
            )
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a width×height picture that the network sees: (left, top, right, bottom) in its pixels."""
        side = min(width, height)
        span_w, span_h = (side, side) if self.fit == "crop" else (width, height)
        seen = self.input_size / self.resize
        half_w, half_h = span_w * seen / 2, span_h * seen / 2
        return width / 2 - half_w, height / 2 - half_h, width / 2 + half_w, height / 2 + half_h

    def place(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Where that part lies in the input: (left, top, right, bottom) in pixels; all of it but for `letterbox`."""
        size = self.input_size
        if self.fit != "letterbox":
            return 0, 0, size, size
        across, down = (max(1, round(size * side / max(width, height))) for side in (width, height))
        left, top = (size - across) // 2, (size - down) // 2
        return left, top, left + across, top + down

    @property
    def resampling(self) -> Image.Resampling:
        """Pillow's name of the interpolation."""
        return Image.Resampling[self.interpolation.upper()]

    def apply(self, image: Image.Image, size: tuple[int, int] | None = None, profile: bytes = b"") -> NDArray[np.uint8]:
        """Resize and crop one RGB picture in a single resampling: uint8, input_size×input_size×3.

        Args:
            image: the picture, perhaps at a reduced scale.
            size: its width and height before it was reduced.
            profile: the ICC profile of its colours, which become sRGB; empty if they are. Converted after resizing.

        Raises:
            ValueError: if the picture is not RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"expected an RGB image, got mode {image.mode}")
        left, top, right, bottom = self.place(*(size or image.size))
        seen = image.resize((right - left, bottom - top), self.resampling, box=self.box(*image.size), reducing_gap=None)
        pixels = np.asarray(to_srgb(seen, profile))
        if pixels.shape[:2] == (self.input_size, self.input_size):
            return pixels
        padded = np.empty((self.input_size, self.input_size, 3), dtype=np.uint8)
        padded[:] = [round(255 * mean) for mean in self.mean]
        padded[top:bottom, left:right] = pixels
        return padded
