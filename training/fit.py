"""The training loop: resumable at every epoch, and the same run whether interrupted or not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import SGD

from models.classifier import LongTailClassifier
from training.config import FitConfig, Recipe
from training.data import Dataset
from training.data.augment import Augment
from training.losses import Criterion
from training.run import Run, RunError, build_network, load_tensors, network_tensors, recipe_in, restore, save_tensors
from training.samplers import epoch_order


def fit(recipe: Recipe, data: Dataset, run: Run, console: Console, device: torch.device) -> LongTailClassifier:
    """Train to the recipe's last epoch, continuing from the run's checkpoint where there is one.

    Raises:
        RunError: if the folder holds a run of another recipe, or training diverges.
    """
    network = build_network(recipe, len(data.classes), data.preprocessing)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's stubs
    network.marc.requires_grad_(False)
    optimizer = _optimizer(network, recipe.fit)
    counts_K = data.train.labels.cpu().bincount(minlength=len(data.classes)).numpy()
    criterion = Criterion(recipe.loss, counts_K, network.head.scalar, device)
    start = _resume(run, recipe, network, optimizer) if run.checkpoint.is_file() else 0
    if start:
        console.print(f"continuing after epoch {start} of {recipe.fit.epochs}")
    steps = math.ceil(len(data.train) / recipe.fit.batch_size)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("training", total=recipe.fit.epochs * steps, completed=start * steps, rate="")
        for epoch in range(start, recipe.fit.epochs):
            began, seen, total = time.perf_counter(), 0, torch.zeros(2, dtype=torch.float64, device=device)
            for step, (loss, hits, size) in enumerate(
                _epoch(network, optimizer, criterion, recipe, data, epoch, device)
            ):
                seen += size
                total += torch.stack([loss * size, hits])
                rate = seen / (time.perf_counter() - began)
                label = f"epoch {epoch + 1}/{recipe.fit.epochs}  loss {float(total[0]) / seen:.3f}"
                progress.update(task, completed=epoch * steps + step + 1, description=label, rate=f"{rate:.0f} img/s")
            mean_loss, accuracy = (total / seen).tolist()
            if not math.isfinite(mean_loss):
                raise RunError(
                    f"the loss became {mean_loss} in epoch {epoch + 1}; lower fit.lr (it is {recipe.fit.lr})"
                )
            _save(run, recipe, network, optimizer, data, epoch + 1)
            if not console.is_terminal:
                left_s = (recipe.fit.epochs - epoch - 1) * (time.perf_counter() - began)
                console.print(
                    f"epoch {epoch + 1}/{recipe.fit.epochs}  loss {mean_loss:.3f}  "
                    f"train accuracy {100 * accuracy:.1f} %  {rate:.0f} img/s  {left_s / 60:.1f} min left"
                )
    return network.eval()


def _epoch(
    network: LongTailClassifier,
    optimizer: SGD,
    criterion: Criterion,
    recipe: Recipe,
    data: Dataset,
    epoch: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """One pass in the sampler's order: yields each batch's loss, number of hits and size.

    The generators are seeded by (seed, epoch), so that an interrupted run continues as if it had not been.
    """
    config = recipe.fit
    seed = recipe.seed * 1_000_003 + epoch
    progress = epoch / config.epochs
    order = epoch_order(config.sampler, data.train.labels, progress, torch.Generator().manual_seed(seed))
    augment = Augment(recipe.augment, torch.Generator(device).manual_seed(seed))
    batches = order.split(config.batch_size)
    network.train()
    for step, index in enumerate(batches):
        images_BHWC = augment(data.train.images[index].to(device))
        labels_B = data.train.labels[index].to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch + step / len(batches))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            logits = network(images_BHWC, labels_B)
        loss = criterion(logits, labels_B, progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        logits_BK = logits if logits.ndim == 2 else logits.sum(dim=1)
        yield loss.detach(), (logits_BK.argmax(dim=1) == labels_B).sum(), len(index)


def learning_rate(config: FitConfig, epoch: float) -> float:
    """Linear warm-up over `warmup_epochs`, then a cosine to zero at `epochs`; `epoch` may be fractional."""
    warmup = min(config.warmup_epochs, config.epochs / 2)
    if epoch < warmup:
        return config.lr * (epoch + 0.05) / (warmup + 0.05)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (config.epochs - warmup)))


def _optimizer(network: LongTailClassifier, config: FitConfig) -> SGD:
    """SGD; single numbers (the scalar, CAMC's sharpness) are not decayed."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 0], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0},
    ]
    return SGD([g for g in groups if g["params"]], lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def _momenta(optimizer: SGD) -> dict[str, Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = {f"momentum.{i}": optimizer.state[p].get("momentum_buffer") for i, p in enumerate(parameters)}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _save(run: Run, recipe: Recipe, network: LongTailClassifier, optimizer: SGD, data: Dataset, epoch: int) -> None:
    meta = {
        "epoch": epoch,
        "recipe": recipe.model_dump(mode="json"),
        "classes": data.classes,
        "train_counts": data.train_counts().tolist(),
    }
    save_tensors(run.checkpoint, network_tensors(network) | _momenta(optimizer), meta)


def _resume(run: Run, recipe: Recipe, network: LongTailClassifier, optimizer: SGD) -> int:
    tensors, meta = load_tensors(run.checkpoint)
    _same_recipe(run, recipe, meta["recipe"])
    restore(network, tensors)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        if (buffer := tensors.get(f"momentum.{i}")) is not None:
            layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
            optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, memory_format=layout)
    return int(meta["epoch"])


def _same_recipe(run: Run, recipe: Recipe, found: dict[str, Any]) -> None:
    """What decides the trained weights must not change half way; calibration settings may."""
    wanted, found = recipe.model_dump(mode="json"), recipe_in(found, run.checkpoint).model_dump(mode="json")
    for section in ("seed", "data", "augment", "model", "loss", "fit"):
        if wanted[section] == found.get(section):
            continue
        if isinstance(wanted[section], dict):
            keys = [k for k in wanted[section] if wanted[section][k] != found.get(section, {}).get(k)]
            section = ", ".join(f"{section}.{key}" for key in keys)
        raise RunError(f"{run.path} holds a run with another {section}: choose another --out, or delete that folder")
