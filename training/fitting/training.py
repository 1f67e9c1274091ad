"""A network in training: its state from one epoch to the next, and the epochs. B batch, R branches, K classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from camcal.models.camc import TaughtAttention
from camcal.models.classifier import LongTailClassifier
from camcal.models.lora import add_lora, merge_lora
from camcal.models.report import Made
from camcal.models.stages import stages
from camcal.training.checkpoints import EMA, check_data, data_meta, load_tensors, network_tensors, restore, save_tensors
from camcal.training.data.augment import Augment
from camcal.training.data.mix import Mix
from camcal.training.distributed import Processes
from camcal.training.fitting.average import Average
from camcal.training.fitting.class_means import start_at_class_means
from camcal.training.fitting.descent import Descent, autocast
from camcal.training.fitting.distill import Teacher
from camcal.training.fitting.losses import Criterion
from camcal.training.fitting.samplers import epoch_order
from camcal.training.provenance import also_made_with
from camcal.training.recipe import FitConfig, parse_recipe
from camcal.training.run import Run, RunError

LESSON = 0.3
"""Weight in the loss of the lesson that teaches the attention."""


class Training:
    """A network on its way through the epochs of a run.

    Args:
        run: its images and settings.
        network: is moved to the run's device.
        teacher: the networks to learn from beside the labels.

    Attributes:
        network: the network whose weights are trained.
        ema_network: with `fit.ema`, the moving average of its weights and batch statistics after each step, in
            evaluation mode and without gradients; otherwise None.
    """

    def __init__(self, run: Run, network: LongTailClassifier, teacher: Teacher | None = None) -> None:
        self.run, self.recipe, self.network, self.teacher = run, run.recipe, network, teacher
        if run.recipe.fit.lora and run.recipe.fit.mode != "frozen":
            add_lora(network.trunk, run.recipe.fit.lora)
        network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's stubs
        network.marc.requires_grad_(False)
        self.frozen = run.recipe.fit.mode == "frozen"
        if self.frozen:
            network.trunk.requires_grad_(False)
        elif run.recipe.fit.frozen_stages:
            freeze_stages(network.trunk, run.recipe.fit.frozen_stages)
        self.average = Average(network, run.recipe.fit.ema) if run.recipe.fit.ema else None
        self.ema_network = self.average.network if self.average else None
        self.descent = Descent(network, run.recipe.fit, run.device)
        counts_K = run.data.train.labels.cpu().bincount(minlength=len(run.data.classes)).numpy()
        self.criterion = Criterion(run.recipe.loss, counts_K, network.head.scalar, run.device)
        self.attention = network.camc if isinstance(network.camc, TaughtAttention) else None
        self.model: nn.Module = OverMaps(network) if self.frozen else network
        self.images = run.data.train
        self.made: list[Made] = []

    def begin(self) -> int:
        """Load the run's checkpoint if there is one, and get ready to train; returns the number of finished epochs.

        Raises:
            RunError: if the checkpoint is of another recipe, other data or another teacher, or no batch has an image
                for each process.
        """
        run = self.run
        start = self._resume() if run.folder.checkpoint.is_file() else 0
        self.made = also_made_with(self.made, run.device)
        if self.frozen and not start:
            start_at_class_means(self.network, self.images)
        if self.average and not start:
            self.average.begin(self.network)
        if start:
            run.console.print(f"continuing after epoch {start} of {self.recipe.fit.epochs}")
        if not self.steps:
            raise RunError(
                f"no batch has {max(2, run.processes.size)} images, one for each process and two at least: "
                f"fit.batch_size is {self.recipe.fit.batch_size} and there are {len(self.images)} training images"
            )
        self.images = self.images.to(run.device)
        self.model = run.processes.wrap(self.model, run.device)
        if self.recipe.fit.compile:
            self.model = compiled(self.model, run.device)
        return start

    def _resume(self) -> int:
        tensors, meta = load_own(self.run)
        heard = [teacher["weights"] for teacher in meta.get("teachers", [])]
        if self.teacher and heard != [facts.weights for facts in self.teacher.facts]:
            raise RunError(
                f"{self.run.folder.path} holds a run with another teacher: choose another --out, or delete that folder"
            )
        restore(self.network, tensors)
        if self.ema_network:
            restore(self.ema_network, tensors, EMA)
        self.descent.restore(tensors)
        self.made = [Made.model_validate(made) for made in meta["made_with"]]
        return int(meta["epoch"])

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return len(_batches(torch.arange(len(self.images)), self.recipe.fit, self.run.processes))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """One pass in the sampler's order. Yields loss, number of hits and size of this process's part of each batch.

        The loss is the part's share of the batch's mean loss, times the batch's size. Generators are seeded by (seed,
        epoch), so that a resumed run equals an uninterrupted one. All processes draw the same order, and each draws its
        own augmentations.
        """
        config, processes, device = self.recipe.fit, self.run.processes, self.run.device
        seed = self.recipe.training_seed * 1_000_003 + epoch
        progress = epoch / config.epochs
        order = epoch_order(config.sampler, self.images.labels, progress, torch.Generator().manual_seed(seed))
        own_seed = seed + processes.rank * 1_000_000_007
        augment = Augment(self.recipe.augment, torch.Generator(device).manual_seed(own_seed))
        mix = Mix(self.recipe.augment, own_seed)
        batches = _batches(order, config, processes)
        parts = self.images.batches([processes.part(index) for index in batches], device, augment)
        self.model.train()
        keep_frozen(self.network.trunk)
        for step, (index, (images_BHWC, labels_B)) in enumerate(zip(batches, parts, strict=True)):
            whole_labels = self.images.labels[index].to(device) if processes.size > 1 else None
            mixed = mix(images_BHWC, labels_B)
            torch.compiler.cudagraph_mark_step_begin()
            with autocast(device, config.precision):
                logits = self.model(mixed.images_BHWC, mixed.labels_B)
            loss = mixed.loss(partial(self.criterion, progress=progress, whole_labels=whole_labels), logits)
            if self.attention is not None and epoch > 0:  # in the first epoch the rows that teach it are still random
                loss = loss + LESSON * self.attention.lesson * len(labels_B) / len(index)
            logits_BK = logits if logits.ndim == 2 else logits.sum(dim=1)
            if self.teacher:
                share = self.recipe.distill.weight
                loss = (1 - share) * loss + share * self.teacher.loss(mixed.images_BHWC, logits_BK) / len(index)
            self.descent.step(loss * processes.size, learning_rate(config, epoch + step / len(batches)))
            if self.average:
                self.average.update(self.network, epoch * len(batches) + step)
            yield loss.detach() * len(index), (logits_BK.argmax(dim=1) == mixed.labels_B).sum(), len(labels_B)

    def check(self, epoch: int, mean_loss: float) -> None:
        """Raises RunError if an epoch ended in a loss that is not finite, or a scalar that is not positive."""
        lr = f"lower fit.lr (it is {self.recipe.fit.lr})"
        if not math.isfinite(mean_loss):
            half = ", or use fit.precision = fp32: fp16 ends at 65504" * (self.recipe.fit.precision == "fp16")
            raise RunError(f"the loss became {mean_loss} in epoch {epoch + 1}; {lr}{half}")
        if not (scalar := self.network.head.scalar) > 0:
            raise RunError(
                f"the scalar of the head became {scalar.item():.3g} in epoch {epoch + 1}; {lr}, or keep the scalar "
                "with model.learn_scalar = false"
            )

    def save(self, epochs: int) -> None:
        """Write the checkpoint after so many epochs, if this process leads."""
        if not self.run.processes.leads:
            return
        meta: dict[str, Any] = {
            "epoch": epochs,
            "recipe": self.recipe.model_dump(mode="json"),
            "made_with": [made.model_dump() for made in self.made],
        }
        meta |= data_meta(self.run.data)
        if self.teacher:
            meta["teachers"] = [facts.model_dump() for facts in self.teacher.facts]
        tensors = network_tensors(self.network) | self.descent.tensors()
        if self.ema_network:
            tensors |= network_tensors(self.ema_network, EMA)
        save_tensors(self.run.folder.checkpoint, tensors, meta)

    def trained(self) -> LongTailClassifier:
        """The network that training results in, in evaluation mode: the average if there is one.

        Adapted layers become plain ones, so this ends the training.
        """
        network = self.ema_network or self.network
        merge_lora(network.trunk)
        return network.eval()


def freeze_stages(trunk: nn.Module, count: int) -> None:
    """Exclude the parameters of the first stages from training.

    Raises:
        RunError: if the trunk has no more stages than that.
    """
    found = stages(trunk)
    if count > (last := max(found.values())):
        raise RunError(
            f"fit.frozen_stages is {count}, but the trunk has {last + 1} stages with its stem: freeze {last} at most, "
            "or the whole trunk with fit.mode = frozen"
        )
    for name, parameter in trunk.named_parameters():
        if found[name] < count:
            parameter.requires_grad_(False)


def keep_frozen(trunk: nn.Module) -> None:
    """Put the layers without trained parameters in evaluation mode, so that batch statistics stay with the weights."""
    for module in trunk.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


class OverMaps(nn.Module):
    """A network without its frozen trunk: maps in, logits out."""

    def __init__(self, network: LongTailClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, maps_BChw: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """The logits, see `LongTailClassifier.forward`."""
        return self.network.logits_of_maps(maps_BChw, labels_B)

    def train(self, mode: bool = True) -> OverMaps:
        super().train(mode)
        self.network.trunk.eval()
        return self


def compiled(model: nn.Module, device: torch.device, backend: str = "inductor") -> nn.Module:
    """The network compiled for the two batch sizes of an epoch, as CUDA graphs on a GPU.

    It shares parameters and buffers with the original network.
    """
    mode = "reduce-overhead" if device.type == "cuda" and backend == "inductor" else None
    return torch.compile(model, dynamic=False, backend=backend, mode=mode)  # type: ignore[return-value]


def _batches(order: Tensor, config: FitConfig, processes: Processes) -> list[Tensor]:
    """Positions of each batch; a last one that is too small is left out, since batch statistics need two images."""
    return [index for index in order.split(config.batch_size) if len(index) >= max(2, processes.size)]


def learning_rate(config: FitConfig, epoch: float) -> float:
    """Linear warm-up over `warmup_epochs`, then a cosine to zero at `epochs`, or steps; `epoch` may be fractional."""
    warmup = min(config.warmup_epochs, config.epochs / 2)
    rate = config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
    if epoch < warmup:
        return rate * (epoch + 0.05) / (warmup + 0.05)
    if config.milestones:
        return rate
    return config.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (config.epochs - warmup)))


def load_own(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a run's checkpoint. Raises RunError if it is of another recipe or other data."""
    tensors, meta = load_tensors(run.folder.checkpoint)
    _same_recipe(run, meta["recipe"])
    check_data(run.folder, meta, run.data)
    return tensors, meta


def _same_recipe(run: Run, raw: dict[str, Any]) -> None:
    """Whatever determines the trained weights must not change on resume; calibration settings may."""
    wanted = run.recipe.deciding()
    found = parse_recipe(raw, run.folder.checkpoint.name).deciding()
    for section in ("seed", "data", "augment", "model", "loss", "fit", "distill"):
        if wanted[section] == found[section]:
            continue
        if isinstance(wanted[section], dict):
            keys = [k for k in wanted[section] if wanted[section][k] != found[section][k]]
            section = ", ".join(f"{section}.{key}" for key in keys)
        raise RunError(
            f"{run.folder.path} holds a run with another {section}: choose another --out, or delete that folder"
        )
