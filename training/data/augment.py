"""Random augmentation of a whole batch at once, on the device that holds it.

B batch, H W image size. Geometry is one affine resampling: flip, shift, crop, aspect and rotation together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from camcal.training.data.policies import PolicyAugment
from camcal.training.recipe import AugmentConfig


class Augment:
    """Applies an `AugmentConfig` to batches of any size; mixing is not part of it, see `camcal.training.data.mix`.

    Args:
        config: what to do.
        generator: on the device of the images; its seed determines all draws.
    """

    def __init__(self, config: AugmentConfig, generator: torch.Generator) -> None:
        self.config = config
        self.generator = generator
        on_host = generator.device.type == "cpu"  # one stream then: two with one seed would draw the same numbers
        self.host = generator if on_host else torch.Generator().manual_seed(generator.initial_seed())
        self.policy = None if config.policy == "none" else PolicyAugment(config.policy, self.host)

    def draw_seed(self) -> int:
        """A seed for random draws that are made elsewhere, such as the crops of images decoded on the fly."""
        return int(torch.randint(2**62, (), generator=self.host))

    def __call__(self, images_BHWC: Tensor, cropped: bool = False) -> Tensor:
        """uint8 B×H×W×3 to float32 B×H×W×3 with values in 0..255.

        Args:
            images_BHWC: square images.
            cropped: `area` and `aspect` have been applied already.
        """
        c = self.config
        if cropped:
            c = c.model_copy(update={"area": (1.0, 1.0), "aspect": (1.0, 1.0)})
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        if c.flip or c.shift or c.rotate or c.area != (1.0, 1.0) or c.aspect != (1.0, 1.0):
            images_BCHW = self._geometry(images_BCHW, c)
        if self.policy is not None:
            images_BCHW = self.policy(images_BCHW.round().to(torch.uint8)).float()
        if c.colour:
            images_BCHW = self._colour(images_BCHW)
        if c.erase:
            images_BCHW = self._erase(images_BCHW)
        return images_BCHW.permute(0, 2, 3, 1)

    def _uniform(self, images_BCHW: Tensor, low: float, high: float) -> Tensor:
        unit = torch.rand(len(images_BCHW), generator=self.generator, device=images_BCHW.device)
        return low + (high - low) * unit

    def _geometry(self, images_BCHW: Tensor, c: AugmentConfig) -> Tensor:
        size = images_BCHW.shape[-1]
        scale = self._uniform(images_BCHW, *c.area).sqrt()
        stretch = torch.exp(self._uniform(images_BCHW, math.log(c.aspect[0]), math.log(c.aspect[1])) / 2)
        width, height = scale * stretch, scale / stretch
        mirror = torch.where(self._uniform(images_BCHW, 0, 1) < 0.5, -1.0, 1.0) if c.flip else torch.ones_like(scale)
        angle = self._uniform(images_BCHW, -c.rotate, c.rotate) * (math.pi / 180)
        # The window moves within the image if it is smaller, and by whole pixels beyond it as far as `shift` allows.
        move_x = (1 - width).clamp_min(0) * self._uniform(images_BCHW, -1, 1)
        move_y = (1 - height).clamp_min(0) * self._uniform(images_BCHW, -1, 1)
        if c.shift:
            move_x = move_x + (self._uniform(images_BCHW, -c.shift - 0.5, c.shift + 0.5).round() * 2 / size)
            move_y = move_y + (self._uniform(images_BCHW, -c.shift - 0.5, c.shift + 0.5).round() * 2 / size)
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack(
            [
                torch.stack([mirror * width * cos, -height * sin, move_x], dim=1),
                torch.stack([mirror * width * sin, height * cos, move_y], dim=1),
            ],
            dim=1,
        )
        grid_BHW2 = functional.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
        if c.fill == "zero":
            return functional.grid_sample(images_BCHW, grid_BHW2, padding_mode="zeros", align_corners=False)
        filled = functional.grid_sample(images_BCHW, grid_BHW2, padding_mode="reflection", align_corners=False)
        if c.fill == "mirror":
            return filled
        return self._plain_fill(filled, grid_BHW2)

    def _plain_fill(self, images_BCHW: Tensor, grid_BHW2: Tensor) -> Tensor:
        """Two images in three get a plain colour outside their border: black, white, or any, in equal shares."""
        kind = self._uniform(images_BCHW, 0, 9).floor()
        colour_BC = 255 * torch.rand(len(kind), 3, generator=self.generator, device=images_BCHW.device)
        colour_BC = torch.where(kind[:, None] < 4, 255 * (kind[:, None] < 2).float(), colour_BC)
        outside_BHW = (grid_BHW2.abs() > 1).any(dim=3) & (kind < 6)[:, None, None]
        return torch.where(outside_BHW[:, None], colour_BC[:, :, None, None], images_BCHW)

    def _colour(self, images_BCHW: Tensor) -> Tensor:
        strength = self.config.colour
        for_each = [self._uniform(images_BCHW, 1 - strength, 1 + strength)[:, None, None, None] for _ in range(3)]
        brightness, contrast, saturation = for_each
        images_BCHW = images_BCHW * brightness
        mean = images_BCHW.mean(dim=(1, 2, 3), keepdim=True)
        images_BCHW = mean + contrast * (images_BCHW - mean)
        grey = images_BCHW.mean(dim=1, keepdim=True)
        return (grey + saturation * (images_BCHW - grey)).clamp(0, 255)

    def _erase(self, images_BCHW: Tensor) -> Tensor:
        """Blank a square with a random centre; near the border it is cut off, as in Cutout."""
        size = images_BCHW.shape[-1]
        half = self.config.erase * size / 2
        position = torch.arange(size, device=images_BCHW.device) + 0.5
        rows = (position - self._uniform(images_BCHW, 0, size)[:, None]).abs() < half
        columns = (position - self._uniform(images_BCHW, 0, size)[:, None]).abs() < half
        colour = 127.5 if self.config.erase_fill == "grey" else 0.0
        return images_BCHW.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], colour)
