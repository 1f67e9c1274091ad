"""The optimiser, and the precision in which the network is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from camcal.models.stages import stages
from camcal.training.recipe import FitConfig

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_STATE = {
    "momentum_buffer": "momentum",  # of SGD
    "exp_avg": "mean",  # of AdamW: moving averages of the gradient and of its square, and the number of steps
    "exp_avg_sq": "mean_square",
    "step": "step",
}
"""An optimiser's state of a parameter, and the name of its tensors in checkpoints."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that computes a network in one of `HALVES`, or in fp32."""
    return torch.autocast(device.type, dtype=HALVES.get(precision), enabled=precision in HALVES)


class Descent:
    """SGD with Nesterov momentum, or AdamW; single numbers (the scalar, CAMC's sharpness) are not decayed.

    fp16 has no values below 6e-8, where many gradients lie. So the loss is multiplied by a scale, and gradients are
    divided by it before they are used (Micikevicius et al., arXiv 1710.03740). A step whose gradients are not finite is
    skipped and the scale halved; after two thousand good steps it is doubled. To check, the host waits for the GPU at
    each step.

    Args:
        network: its parameters are trained, except those that need no gradient.
        device: of the network.
    """

    def __init__(self, network: nn.Module, config: FitConfig, device: torch.device) -> None:
        shares = _shares(network, config)
        members: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                decay = config.weight_decay if parameter.ndim > 0 else 0.0
                members.setdefault((shares.get(name, 1.0), decay), []).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": members[share, decay], "weight_decay": decay, "share": share}
            for share, decay in sorted(members, reverse=True)
        ]
        self.optimizer: Optimizer
        if config.optimizer == "adamw":
            self.optimizer = AdamW(groups, lr=config.lr)
        else:
            self.optimizer = SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def step(self, loss: Tensor, rate: float) -> None:
        """Move the weights against the gradient of a loss, at a learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def tensors(self) -> dict[str, Tensor]:
        """The state between steps: `momentum.*` and its like, and `scaler` for fp16."""
        kept = self.optimizer.state
        found = {f"{name}.{i}": kept[p].get(key) for i, p in self._parameters() for key, name in _STATE.items()}
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        if state := self.scaler.state_dict():
            tensors["scaler"] = torch.tensor([state["scale"], state["_growth_tracker"]])
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave, as far as it is in these."""
        for i, parameter in self._parameters():
            layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
            for key, name in _STATE.items():
                if (tensor := tensors.get(f"{name}.{i}")) is not None:
                    if key != "step":  # torch keeps it on the CPU
                        tensor = tensor.to(parameter.device, memory_format=layout)
                    self.optimizer.state[parameter][key] = tensor
        if (scaler := tensors.get("scaler")) is not None:
            scale, good_steps = scaler.tolist()
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(good_steps)})

    def _parameters(self) -> list[tuple[int, Tensor]]:
        return list(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))


def _shares(network: nn.Module, config: FitConfig) -> dict[str, float]:
    """The learning rate of each of the trunk's parameters as a share of `config.lr`, by name."""
    if config.layer_decay == 1:
        return {name: config.trunk_lr for name, _ in network.named_parameters() if name.startswith("trunk.")}
    found = stages(network.get_submodule("trunk"))
    last = max(found.values())
    return {f"trunk.{name}": config.trunk_lr * config.layer_decay ** (last - stage) for name, stage in found.items()}
