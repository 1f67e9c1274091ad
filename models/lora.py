"""Low-rank adaptation (LoRA) of a pretrained trunk (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W + B·A, with A of r×columns and B of rows×r, for a weight W that stays as it is. B starts at zero.

    The paper's scale α/r is 1: another one changes the learning rate that is best.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.up @ self.down


def add_lora(trunk: nn.Module, rank: int) -> None:
    """Freeze a trunk and adapt the weights of its linear layers, those of attention and MLPs.

    As parametrisations they also reach code that multiplies by `layer.weight` itself, as timm's BEiT and EVA do.

    Args:
        rank: r.

    Raises:
        ValueError: if the trunk has no linear layer.
    """
    layers = [module for module in trunk.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("fit.lora is for trunks with linear layers, such as transformers and ConvNeXts; this has none")
    trunk.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def merge_lora(trunk: nn.Module) -> None:
    """Replace adapted layers by plain ones with the weight W + B·A.

    Copies of a parametrised module share its class, which torch's own `remove_parametrizations` would change.
    """
    for name, module in list(trunk.named_modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
            plain.bias = module.bias
            trunk.set_submodule(name, plain)
