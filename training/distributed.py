"""Several processes for one run, as `torchrun` starts them: each takes its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from camcal.models.camc import CAMC


@dataclass(frozen=True)
class Processes:
    """The processes that train a run together, seen from one of them: its rank and their number. Default: one alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def part(self, batch_B: Tensor) -> Tensor:
        """This process's part of a batch; parts differ in length by at most one."""
        return batch_B[self.rank :: self.size]

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def wait(self, device: torch.device) -> None:
        """Block until all processes have called this."""
        self.total(torch.zeros(1, device=device)).item()  # reading waits for the GPU; the sum alone does not

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network for training: gradients, batch statistics and prototypes are those of all processes together.

        Gradients are averaged: a process's loss must be `size` times its share of the batch's. The network itself
        changes only in that its batch normalisations become synchronised ones of the same parameters and names.
        """
        if self.size == 1:
            return network
        for module in network.modules():
            if isinstance(module, CAMC):
                module.gather = self.total
        if device.type == "cuda":
            return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(network), device_ids=[device])
        _synchronise(network)
        return DistributedDataParallel(network)


ALONE = Processes()


def _synchronise(network: nn.Module) -> None:
    """Replace each batch normalisation inside a network by a `SyncedBatchNorm2d`."""
    for name, module in network.named_children():
        if type(module) is nn.BatchNorm2d:
            setattr(network, name, SyncedBatchNorm2d.of(module))
        else:
            _synchronise(module)


class _Total(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _total(gradients[0])


def _total(values: Tensor) -> Tensor:
    total: Tensor = _Total.apply(values)
    return total


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics over all processes; torch's own SyncBatchNorm works on GPUs only."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> SyncedBatchNorm2d:
        """One that shares the parameters and buffers of `norm`."""
        synced = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        synced.weight, synced.bias = norm.weight, norm.bias
        synced.running_mean, synced.running_var = norm.running_mean, norm.running_var
        synced.num_batches_tracked = norm.num_batches_tracked
        return synced.train(norm.training)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(features_BCHW)
            return plain
        wide_BCHW = features_BCHW.to(self.weight.dtype)
        count = wide_BCHW.new_full((1,), wide_BCHW.numel() // wide_BCHW.shape[1])
        sum_C, number = _total(torch.cat([wide_BCHW.sum(dim=(0, 2, 3)), count])).split([self.num_features, 1])
        centred_BCHW = wide_BCHW - (sum_C / number)[:, None, None]
        variance_C = _total(centred_BCHW.square().sum(dim=(0, 2, 3))) / number
        self._follow((sum_C / number).detach(), (variance_C * number / (number - 1)).detach())
        scale_C = self.weight * (variance_C + self.eps).rsqrt()
        out_BCHW: Tensor = centred_BCHW * scale_C[:, None, None] + self.bias[:, None, None]
        return out_BCHW.to(features_BCHW.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C, self.momentum)
        self.num_batches_tracked.add_(1)


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that `torchrun` has started this one with, and its own device of that kind; or this one alone.

    NCCL connects GPUs, gloo CPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), size), device
    finally:
        distributed.destroy_process_group()
