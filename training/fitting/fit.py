"""The training loop: resumable at every epoch, and the same run whether interrupted or not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from camcal.models.camc import TaughtAttention
from camcal.models.classifier import LongTailClassifier
from camcal.models.report import Made
from camcal.training.data import Dataset
from camcal.training.data.augment import Augment
from camcal.training.data.mix import Mix
from camcal.training.distributed import ALONE, Group
from camcal.training.fitting.class_means import start_at_class_means
from camcal.training.fitting.descent import Descent, autocast
from camcal.training.fitting.distill import Teacher
from camcal.training.fitting.losses import Criterion, branch_members
from camcal.training.fitting.samplers import epoch_order
from camcal.training.provenance import also_made_with
from camcal.training.recipe import FitConfig, Recipe, parse_recipe
from camcal.training.run import (
    Run,
    RunError,
    build_network,
    check_data,
    data_meta,
    load_tensors,
    network_tensors,
    restore,
    save_tensors,
)

LESSON = 0.3
"""What the attention's lesson counts for in the loss."""

READ_EVERY = 20
"""Steps between two looks at the loss: a look waits until a GPU has done all that it has been given."""


def fit(
    recipe: Recipe,
    data: Dataset,
    run: Run,
    console: Console,
    device: torch.device,
    group: Group = ALONE,
    teacher: Teacher | None = None,
    begun: LongTailClassifier | None = None,
) -> LongTailClassifier:
    """Train to the recipe's last epoch, continuing from the run's checkpoint where there is one.

    Where there is none, training starts from the weights of `begun`, or else from those of the recipe.

    Each process of a group calls this and takes its part of every batch; the leading one writes the checkpoints.

    Raises:
        RunError: if the folder holds a run of another recipe, no batch has an image for each process, or training
            diverges or turns the head's scalar over.
    """
    network = build_network(recipe, len(data.classes), data.preprocessing)
    if begun is not None:
        network.load_state_dict(begun.state_dict())
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's stubs
    network.marc.requires_grad_(False)
    frozen = recipe.fit.mode == "frozen"
    if frozen:
        network.trunk.requires_grad_(False)
    descent = Descent(network, recipe.fit, device)
    counts_K = data.train.labels.cpu().bincount(minlength=len(data.classes)).numpy()
    criterion = Criterion(recipe.loss, counts_K, network.head.scalar, device)
    start, made = _resume(run, recipe, network, descent, data, teacher) if run.checkpoint.is_file() else (0, [])
    made = also_made_with(made, device)
    if frozen and not start:
        start_at_class_means(network, data.train)
    if start:
        console.print(f"continuing after epoch {start} of {recipe.fit.epochs}")
    steps = len(_batches(torch.arange(len(data.train)), recipe.fit, group))
    if not steps:
        raise RunError(
            f"no batch has {max(2, group.size)} images, one for each process and two at least: fit.batch_size is "
            f"{recipe.fit.batch_size} and there are {len(data.train)} training images"
        )
    data = replace(data, train=data.train.to(device))
    model = group.wrap(OverMaps(network) if frozen else network, device)
    attention = network.camc if isinstance(network.camc, TaughtAttention) else None
    if recipe.fit.compile:
        model = compiled(model, device)
    read_every = 1 if device.type == "cpu" else READ_EVERY
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("training", total=recipe.fit.epochs * steps, completed=start * steps, rate="")
        for epoch in range(start, recipe.fit.epochs):
            began, seen, total = time.perf_counter(), 0, torch.zeros(3, dtype=torch.float64, device=device)
            losses = _epoch(model, descent, criterion, recipe, data, epoch, device, group, teacher, attention)
            for step, (loss, hits, size) in enumerate(losses, start=1):
                seen += size
                total[:2] += torch.stack([loss, hits])
                if step % read_every == 0 or step == steps:
                    label = f"epoch {epoch + 1}/{recipe.fit.epochs}  loss {float(total[0]) / seen:.3f}"
                    rate = f"{group.size * seen / (time.perf_counter() - began):.0f} img/s"
                    progress.update(task, completed=epoch * steps + step, description=label, rate=rate)
            total[2] = seen
            mean_loss, accuracy, _ = (group.total(total) / total[2]).tolist()
            if not math.isfinite(mean_loss):
                half = ", or take fit.precision = fp32: fp16 ends at 65504" * (recipe.fit.precision == "fp16")
                raise RunError(
                    f"the loss became {mean_loss} in epoch {epoch + 1}; lower fit.lr (it is {recipe.fit.lr}){half}"
                )
            if not network.head.scalar > 0:
                raise RunError(
                    f"the scalar of the head became {network.head.scalar.item():.3g} in epoch {epoch + 1}; lower "
                    f"fit.lr (it is {recipe.fit.lr}), or keep the scalar with model.learn_scalar = false"
                )
            if group.leads:
                _save(run, recipe, network, descent, data, epoch + 1, teacher, made)
            if not console.is_terminal:
                left_s = (recipe.fit.epochs - epoch - 1) * (time.perf_counter() - began)
                console.print(
                    f"epoch {epoch + 1}/{recipe.fit.epochs}  loss {mean_loss:.3f}  "
                    f"train accuracy {100 * accuracy:.1f} %  {rate}  {left_s / 60:.1f} min left"
                )
    return network.eval()


class OverMaps(nn.Module):
    """A network whose frozen trunk has seen the images before: maps in, logits out."""

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


def check_start(recipe: Recipe, data: Dataset, run: Run) -> None:
    """Raises what `fit` would raise before anything is learned."""
    build_network(recipe, len(data.classes), data.preprocessing)
    if recipe.model.reslt != "off":
        branch_members(recipe.loss, data.train.labels.cpu().bincount(minlength=len(data.classes)).numpy())
    if run.checkpoint.is_file():
        _load_own(run, recipe, data)


def compiled(model: nn.Module, device: torch.device, backend: str = "inductor") -> nn.Module:
    """The network compiled for the two sizes that an epoch's batches have, as CUDA graphs on a GPU.

    It shares parameters and buffers with the network it is made from.
    """
    mode = "reduce-overhead" if device.type == "cuda" and backend == "inductor" else None
    return torch.compile(model, dynamic=False, backend=backend, mode=mode)  # type: ignore[return-value]


def _epoch(
    network: nn.Module,
    descent: Descent,
    criterion: Criterion,
    recipe: Recipe,
    data: Dataset,
    epoch: int,
    device: torch.device,
    group: Group = ALONE,
    teacher: Teacher | None = None,
    attention: TaughtAttention | None = None,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """One pass in the sampler's order: yields the summed loss, number of hits and size of this process's part of each
    batch; the loss is what the part adds to the batch's mean, times the batch's size.

    The generators are seeded by (seed, epoch), so that an interrupted run continues as if it had not been. All
    processes of a group draw the same order, and each its own augmentations.
    """
    config = recipe.fit
    seed = recipe.training_seed * 1_000_003 + epoch
    progress = epoch / config.epochs
    order = epoch_order(config.sampler, data.train.labels, progress, torch.Generator().manual_seed(seed))
    own_seed = seed + group.rank * 1_000_000_007
    augment = Augment(recipe.augment, torch.Generator(device).manual_seed(own_seed))
    mix = Mix(recipe.augment, own_seed)
    batches = _batches(order, config, group)
    parts = data.train.batches([group.part(index) for index in batches], device, augment)
    network.train()
    for step, (index, (images_BHWC, labels_B)) in enumerate(zip(batches, parts, strict=True)):
        whole_labels = data.train.labels[index].to(device) if group.size > 1 else None
        mixed = mix(images_BHWC, labels_B)
        torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, config.precision):
            logits = network(mixed.images_BHWC, mixed.labels_B)
        loss = mixed.loss(partial(criterion, progress=progress, whole_labels=whole_labels), logits)
        if attention is not None and epoch > 0:  # in the first epoch the rows that teach it say nothing yet
            loss = loss + LESSON * attention.lesson * len(labels_B) / len(index)
        logits_BK = logits if logits.ndim == 2 else logits.sum(dim=1)
        if teacher:
            share = recipe.distill.weight
            loss = (1 - share) * loss + share * teacher.loss(mixed.images_BHWC, logits_BK) / len(index)
        descent.step(loss * group.size, learning_rate(config, epoch + step / len(batches)))
        yield loss.detach() * len(index), (logits_BK.argmax(dim=1) == mixed.labels_B).sum(), len(labels_B)


def _batches(order: Tensor, config: FitConfig, group: Group) -> list[Tensor]:
    """Positions of each batch; a last one that is too small is left out, for batch statistics want two images."""
    return [index for index in order.split(config.batch_size) if len(index) >= max(2, group.size)]


def learning_rate(config: FitConfig, epoch: float) -> float:
    """Linear warm-up over `warmup_epochs`, then a cosine to zero at `epochs`, or steps; `epoch` may be fractional."""
    warmup = min(config.warmup_epochs, config.epochs / 2)
    rate = config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
    if epoch < warmup:
        return rate * (epoch + 0.05) / (warmup + 0.05)
    if config.milestones:
        return rate
    return config.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (config.epochs - warmup)))


def _save(
    run: Run,
    recipe: Recipe,
    network: LongTailClassifier,
    descent: Descent,
    data: Dataset,
    epoch: int,
    teacher: Teacher | None,
    made: list[Made],
) -> None:
    meta = {
        "epoch": epoch,
        "recipe": recipe.model_dump(mode="json"),
        "made_with": [each.model_dump() for each in made],
    } | data_meta(data)
    if teacher:
        meta["teachers"] = teacher.meta
    save_tensors(run.checkpoint, network_tensors(network) | descent.tensors(), meta)


def _resume(
    run: Run,
    recipe: Recipe,
    network: LongTailClassifier,
    descent: Descent,
    data: Dataset,
    teacher: Teacher | None,
) -> tuple[int, list[Made]]:
    """Take up the run's checkpoint: its epoch, and what has trained it so far."""
    tensors, meta = _load_own(run, recipe, data)
    if teacher and [t["weights"] for t in meta["teachers"]] != [t["weights"] for t in teacher.meta]:
        raise RunError(f"{run.path} holds a run with another teacher: choose another --out, or delete that folder")
    restore(network, tensors)
    descent.restore(tensors)
    return int(meta["epoch"]), [Made.model_validate(each) for each in meta["made_with"]]


def _load_own(run: Run, recipe: Recipe, data: Dataset) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a run's checkpoint. Raises RunError if it is of another recipe or other data."""
    tensors, meta = load_tensors(run.checkpoint)
    _same_recipe(run, recipe, meta["recipe"])
    check_data(run, meta, data)
    return tensors, meta


def _same_recipe(run: Run, recipe: Recipe, found: dict[str, Any]) -> None:
    """What decides the trained weights must not change half way; calibration settings may."""
    wanted = recipe.deciding()
    found = parse_recipe(found, run.checkpoint.name).deciding()
    for section in ("seed", "data", "augment", "model", "loss", "fit", "distill"):
        if wanted[section] == found.get(section):
            continue
        if isinstance(wanted[section], dict):
            keys = [k for k in wanted[section] if wanted[section][k] != found.get(section, {}).get(k)]
            section = ", ".join(f"{section}.{key}" for key in keys)
        raise RunError(f"{run.path} holds a run with another {section}: choose another --out, or delete that folder")
