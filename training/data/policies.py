"""Augmentation policies: an operation and its magnitude are drawn for each image.

AutoAugment: Cubuk et al., arXiv 1805.09501, tables 7 and 9 and appendix (magnitudes 0..9 of ten).
TrivialAugment, wide: Müller and Hutter, arXiv 2103.10158, table 1 (31 magnitudes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from camcal.training.data.operations import NAMES, apply
from camcal.training.recipe import Policy

Step = tuple[str, float, int]
"""Operation, probability, magnitude (0 where it has none)."""

CIFAR10: tuple[tuple[Step, Step], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("colour", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("colour", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("colour", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("colour", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("colour", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)

IMAGENET: tuple[tuple[Step, Step], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("colour", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)

TRIVIAL = tuple(name for name in NAMES if name != "invert")

SIGNED = 9
"""The first nine of `NAMES`, geometry and enhancements, have a random sign."""


def magnitudes(size: int, wide: bool) -> Tensor:
    """The scale of each operation of `NAMES` for images of size×size: 15×10, or 15×31 for TrivialAugment's wide one."""
    steps = 31 if wide else 10
    index = torch.arange(steps)
    shear, shift, turn, change, bits = (0.99, 32.0, 135.0, 0.99, 6) if wide else (0.3, size * 150 / 331, 30.0, 0.9, 4)
    kept = 8 - (index / ((steps - 1) / bits)).round()
    most = [shear, shear, shift, shift, turn, change, change, change, change]
    none = torch.zeros(steps)
    rows = [torch.linspace(0, top, steps) for top in most] + [kept, torch.linspace(255, 0, steps)] + [none] * 4
    return torch.stack(rows)


class PolicyAugment:
    """Draws and applies a policy; draws are made on the CPU, and so are the same on every device.

    Args:
        policy: not `none`.
        generator: on the CPU.
    """

    def __init__(self, policy: Policy, generator: torch.Generator) -> None:
        self.policy = policy
        self.generator = generator
        self.steps = IMAGENET if policy == "autoaugment-imagenet" else CIFAR10
        index = {name: i for i, name in enumerate(NAMES)}
        self.kinds = torch.tensor([[index[name] for name, _, _ in pair] for pair in self.steps])
        self.chances = torch.tensor([[chance for _, chance, _ in pair] for pair in self.steps])
        self.levels = torch.tensor([[level for _, _, level in pair] for pair in self.steps])
        self.trivial = torch.tensor([index[name] for name in TRIVIAL])

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """uint8 B×3×S×S to the same."""
        for kinds_B, magnitudes_B in self.draw(len(images_BCHW), images_BCHW.shape[-1]):
            images_BCHW = apply(images_BCHW, kinds_B, magnitudes_B)
        return images_BCHW

    def draw(self, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """For each step in turn, an operation and its magnitude for each of `count` images of size×size."""
        if self.policy == "trivialaugment":
            kinds_B = self.trivial[self._integers(len(self.trivial), count)]
            return [(kinds_B, self._signed(kinds_B, magnitudes(size, wide=True)[kinds_B, self._integers(31, count)]))]
        pair_B, table = self._integers(len(self.steps), count), magnitudes(size, wide=False)
        drawn = []
        for step in (0, 1):
            used_B = torch.rand(count, generator=self.generator) <= self.chances[pair_B, step]
            kinds_B = torch.where(used_B, self.kinds[pair_B, step], NAMES.index("identity"))
            drawn.append((kinds_B, self._signed(kinds_B, table[kinds_B, self.levels[pair_B, step]])))
        return drawn

    def _integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator)

    def _signed(self, kinds_B: Tensor, magnitudes_B: Tensor) -> Tensor:
        negative_B = (self._integers(2, len(kinds_B)) == 0) & (kinds_B < SIGNED)
        return torch.where(negative_B, -magnitudes_B, magnitudes_B)
