"""The training loop. It can resume after every epoch, with the same result as without interruption."""

from __future__ import annotations

import time

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from camcal.models.classifier import LongTailClassifier
from camcal.training.checkpoints import build_network
from camcal.training.fitting.distill import Teacher
from camcal.training.fitting.losses import branch_members
from camcal.training.fitting.training import Training, load_own
from camcal.training.run import Run

READ_EVERY = 20
"""Steps between two reads of the loss from a GPU: each read waits until the GPU has done all that it was given."""


def fit(run: Run, teacher: Teacher | None = None, begun: LongTailClassifier | None = None) -> LongTailClassifier:
    """Train to the recipe's last epoch, continuing from the run's checkpoint if there is one.

    Every process of a run calls this and takes its part of each batch; the leading one writes the checkpoints.

    Returns:
        The trained network; with `fit.ema`, the average of its weights.

    Args:
        teacher: the networks to learn from beside the labels.
        begun: a network whose weights training starts from if there is no checkpoint; by default the recipe's.

    Raises:
        RunError: if the folder holds a run of another recipe, no batch has an image for each process, or training
            diverges or turns the head's scalar negative.
    """
    network = build_network(run.recipe, len(run.data.classes), run.data.preprocessing)
    if begun is not None:
        network.load_state_dict(begun.state_dict())
    training = Training(run, network, teacher)
    start, epochs, steps = training.begin(), run.recipe.fit.epochs, training.steps
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    shown = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=run.console, transient=True)
    with shown:
        task = shown.add_task("training", total=epochs * steps, completed=start * steps, rate="")
        for epoch in range(start, epochs):
            totals = _Totals(run)
            for step, done in enumerate(training.epoch(epoch), start=1):
                totals.add(*done)
                if step % totals.read_every == 0 or step == steps:
                    label = f"epoch {epoch + 1}/{epochs}  loss {totals.mean_loss():.3f}"
                    shown.update(task, completed=epoch * steps + step, description=label, rate=totals.rate())
            loss, accuracy = totals.of_all_processes()
            training.check(epoch, loss)
            training.save(epoch + 1)
            if not run.console.is_terminal:
                left = (epochs - epoch - 1) * totals.seconds() / 60
                run.console.print(
                    f"epoch {epoch + 1}/{epochs}  loss {loss:.3f}  train accuracy {100 * accuracy:.1f} %  "
                    f"{totals.rate()}  {left:.1f} min left"
                )
    return training.trained()


def check_start(run: Run) -> None:
    """Raises what `fit` would raise before the first epoch."""
    build_network(run.recipe, len(run.data.classes), run.data.preprocessing)
    if run.recipe.model.reslt != "off":
        counts_K = run.data.train.labels.cpu().bincount(minlength=len(run.data.classes)).numpy()
        branch_members(run.recipe.loss, counts_K)
    if run.folder.checkpoint.is_file():
        load_own(run)


class _Totals:
    """Loss, hits and number of the images of an epoch so far."""

    def __init__(self, run: Run) -> None:
        self.processes = run.processes
        self.read_every = 1 if run.device.type == "cpu" else READ_EVERY
        self.began, self.seen = time.perf_counter(), 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=run.device)

    def add(self, loss: Tensor, hits: Tensor, size: int) -> None:
        self.seen += size
        self.sums[:2] += torch.stack([loss, hits])

    def mean_loss(self) -> float:
        return float(self.sums[0]) / self.seen

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def rate(self) -> str:
        return f"{self.processes.size * self.seen / self.seconds():.0f} img/s"

    def of_all_processes(self) -> tuple[float, float]:
        """Mean loss, and accuracy."""
        self.sums[2] = self.seen
        loss, accuracy, _ = (self.processes.total(self.sums) / self.sums[2]).tolist()
        return loss, accuracy
