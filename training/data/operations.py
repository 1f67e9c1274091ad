"""Operations of the augmentation policies on batches of uint8 images, each image with its own magnitude.

They compute what `torchvision.transforms.functional` computes for one tensor image, without a loop over images.

B batch, H W image size, R rows (one for each channel of each image), P pixels, L grey levels. Images are uint8 B×3×H×W;
magnitudes are floating point, B, in the units of torchvision's `AutoAugment`: shear as a tangent, translation in
pixels, rotation in degrees, enhancements as the change from 1, posterize in bits kept, solarize as a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

FILL = 128
"""The grey level shown outside the image, as in the policy's code for CIFAR (arXiv 1805.09501 fills with the mean)."""

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def matrices(kinds_B: Tensor, magnitudes_B: Tensor, size: int) -> Tensor:
    """From output to input positions, B×2×3, in pixels from the centre; `kinds_B` indexes `GEOMETRIC`.

    Shears leave the top or left edge in place, rotations the centre; translations are by whole pixels.
    """
    m, zero, one = magnitudes_B.double(), torch.zeros(len(kinds_B)).double(), torch.ones(len(kinds_B)).double()
    cos, sin, half, step = (m * math.pi / 180).cos(), (m * math.pi / 180).sin(), m * size / 2, m.trunc()
    rows = torch.stack(
        [
            torch.stack([one, m, half, zero, one, zero]),
            torch.stack([one, zero, zero, m, one, half]),
            torch.stack([one, zero, -step, zero, one, zero]),
            torch.stack([one, zero, zero, zero, one, -step]),
            torch.stack([cos, -sin, zero, sin, cos, zero]),
        ]
    )
    return rows[kinds_B, :, torch.arange(len(kinds_B))].reshape(-1, 2, 3).float()


def warp(images_BCHW: Tensor, matrices_B23: Tensor) -> Tensor:
    """Move pixels by `matrices`, taking the nearest one, with `FILL` outside. H = W."""
    size = images_BCHW.shape[-1]
    position_W = torch.arange(size, device=images_BCHW.device) - (size - 1) / 2
    position_HW3 = torch.stack(
        [
            position_W.expand(size, size),
            position_W[:, None].expand(size, size),
            torch.ones(size, size, device=images_BCHW.device),
        ],
        dim=2,
    )
    grid_BHW2 = (position_HW3.reshape(1, -1, 3) @ (matrices_B23 / (size / 2)).transpose(1, 2)).reshape(
        -1, size, size, 2
    )
    # Zero stands for the outside, so what is inside is moved up by one grey level and back.
    moved = functional.grid_sample(images_BCHW.float() + 1, grid_BHW2, mode="nearest", align_corners=False)
    return torch.where(moved == 0, FILL, moved - 1).to(torch.uint8)


def _wide(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]


def _blend(images_BCHW: Tensor, other_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """(1 + m)·image - m·other, truncated to grey levels."""
    factor = 1 + _wide(magnitudes_B)
    return (factor * images_BCHW + (1 - factor) * other_BCHW).clamp(0, 255).to(torch.uint8)


def _grey(images_BCHW: Tensor) -> Tensor:
    red, green, blue = images_BCHW.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor().unsqueeze(1)


def brightness(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Blend with black."""
    return _blend(images_BCHW, torch.zeros((), device=images_BCHW.device), magnitudes_B)


def colour(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blend(images_BCHW, _grey(images_BCHW), magnitudes_B)


def contrast(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Blend with the mean grey level."""
    return _blend(images_BCHW, _grey(images_BCHW).mean(dim=(1, 2, 3), keepdim=True), magnitudes_B)


def sharpness(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Blend with the image smoothed by (1 1 1; 1 5 1; 1 1 1)/13, whose border pixels stay."""
    if min(images_BCHW.shape[2:]) <= 2:
        return images_BCHW
    wide = images_BCHW.float()
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    nine = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = wide.clone()
    smooth[:, :, 1:-1, 1:-1] = ((nine + 4 * wide[:, :, 1:-1, 1:-1]) / 13).round()
    return _blend(images_BCHW, smooth, magnitudes_B)


def posterize(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Keep the highest bits of each grey level."""
    return images_BCHW & _wide(256 - 2 ** (8 - magnitudes_B.int())).to(torch.uint8)


def solarize(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Invert grey levels from the threshold on."""
    return torch.where(images_BCHW >= _wide(magnitudes_B), 255 - images_BCHW, images_BCHW)


def autocontrast(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Stretch each channel to 0..255; one with a single grey level stays."""
    low, high = torch.aminmax(images_BCHW.flatten(2), dim=2)
    low, high = low[..., None, None].float(), high[..., None, None].float()
    flat = low == high
    scale = 255 / torch.where(flat, 255, high - low)
    return ((images_BCHW - torch.where(flat, 0, low)) * scale).clamp(0, 255).to(torch.uint8)


def equalize(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Flatten each channel's histogram, as Pillow does."""
    levels_RP = images_BCHW.flatten(2).flatten(0, 1).long()
    histogram_RL = torch.zeros(len(levels_RP), 256, dtype=torch.int64, device=images_BCHW.device)
    histogram_RL.scatter_add_(1, levels_RP, torch.ones_like(levels_RP))
    in_brightest_R1 = histogram_RL.gather(1, levels_RP.amax(dim=1, keepdim=True))
    step_R1 = (levels_RP.shape[1] - in_brightest_R1) // 255
    below_RL = histogram_RL.cumsum(dim=1) - histogram_RL
    table_RL = ((below_RL + step_R1 // 2) // step_R1.clamp_min(1)).clamp(0, 255)
    table_RL[:, 0] = 0
    out_RP = torch.where(step_R1 == 0, levels_RP, table_RL.gather(1, levels_RP))
    return out_RP.to(torch.uint8).reshape(images_BCHW.shape)


def invert(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """255 minus each grey level."""
    return 255 - images_BCHW


def identity(images_BCHW: Tensor, magnitudes_B: Tensor) -> Tensor:
    """The images themselves."""
    return images_BCHW


Operation = Callable[[Tensor, Tensor], Tensor]

POINTWISE: tuple[Operation, ...] = (
    brightness,
    colour,
    contrast,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
    invert,
    identity,
)

NAMES = (*GEOMETRIC, *(operation.__name__ for operation in POINTWISE))


def apply(images_BCHW: Tensor, kinds_B: Tensor, magnitudes_B: Tensor) -> Tensor:
    """Each image's own operation, at most eleven calls for the batch.

    Args:
        images_BCHW: uint8, on any device.
        kinds_B: indices into `NAMES`, on the CPU, since the sizes of the groups depend on them.
        magnitudes_B: on the CPU.
    """
    device, geometric = images_BCHW.device, len(GEOMETRIC)
    order_B = kinds_B.argsort(stable=True)
    kinds_B, magnitudes_B = kinds_B[order_B], magnitudes_B[order_B]
    counts = kinds_B.bincount(minlength=len(NAMES)).tolist()
    moved = sum(counts[:geometric])
    theta = matrices(kinds_B[:moved], magnitudes_B[:moved], images_BCHW.shape[-1]).to(device, non_blocking=True)
    order_B = order_B.to(device, non_blocking=True)
    magnitudes_B = magnitudes_B.float().to(device, non_blocking=True)
    sizes = [moved, *counts[geometric:]]
    parts = [warp(images_BCHW[order_B[:moved]], theta)] if moved else []
    groups = zip(POINTWISE, order_B.split(sizes)[1:], magnitudes_B.split(sizes)[1:], strict=True)
    parts += [operation(images_BCHW[index], m) for operation, index, m in groups if len(index)]
    out = torch.empty_like(images_BCHW)
    out[order_B] = torch.cat(parts)
    return out
