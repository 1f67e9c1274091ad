"""From a recipe to a bundle: training, with teachers and second training, and the other steps."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from camcal.models.backbones import build_backbone
from camcal.models.bundle import Bundle
from camcal.training.checkpoints import build_network, is_trained
from camcal.training.data.features import LabelledMaps, with_maps
from camcal.training.distributed import process_group
from camcal.training.fitting.distill import Teacher, load_teachers
from camcal.training.fitting.fit import check_start, fit
from camcal.training.fitting.learned_prior import balanced_twice, logit_prior
from camcal.training.pipeline.steps import calibrate_run, evaluate_run, export_run
from camcal.training.recipe import Recipe
from camcal.training.run import Run, RunError, RunFolder, default_device


def train(recipe: Recipe, folder: RunFolder, console: Console) -> Bundle | None:
    """All steps. An interrupted run continues; a finished one is only calibrated, evaluated and exported again.

    Under `torchrun` all processes train; the leading one does the rest, and the others return None.
    """
    with ExitStack() as stack:
        with process_group(default_device()) as (processes, device):
            console.quiet |= not processes.leads
            if recipe.distill.weight and recipe.distill.set is None:
                load_teachers(recipe)  # report what is wrong with them before images are read
            if recipe.model.weights is not None:
                console.print(_origin(recipe))
            folder.make()
            if processes.leads:
                stack.enter_context(folder.claimed())
            run = Run(recipe=recipe, folder=folder, console=console, device=device, processes=processes)
            run = replace(run, recipe=recipe.for_images(len(run.data.train)), given=run.data)
            _announce(run)
            began = time.perf_counter()
            run = mapped(run)
            fit_run(run)
            console.print(f"trained in {time.perf_counter() - began:.0f} s")
        if not processes.leads:
            return None
        run = replace(run, device=default_device())
        calibrate_run(run)
        evaluate_run(run)
        return export_run(run)


def _announce(run: Run) -> None:
    recipe, data = run.recipe, run.data
    if data.left_out:
        run.console.print(f"warning: {data.left_out}")
    several = f" × {run.processes.size}" if run.processes.size > 1 else ""
    run.console.print(
        f"training {recipe.model.backbone} on {len(data.train)} images of {len(data.classes)} classes, "
        f"{run.device.type}{several}"
    )
    counts_K = data.train_counts()
    if (doubt := balanced_twice(logit_prior(recipe, counts_K), counts_K)) is not None:
        run.console.print(f"warning: {doubt}")


def _origin(recipe: Recipe) -> str:
    """A sentence about the weights that training starts from. Raises RunError if they cannot be had."""
    try:
        model = recipe.model
        build_backbone(model.backbone, model.weights, recipe.data.input_size, model.output_stride)
    except ValueError as error:
        raise RunError(f"{error}; or train without pretrained weights: camcal train photos-from-scratch") from None
    held = ", which stay frozen" if recipe.fit.mode == "frozen" else ""
    return (
        f"starting from pretrained weights of {recipe.model.backbone} ({Path(recipe.model.weights or '').name}){held}"
    )


def fit_run(run: Run) -> None:
    """Train the network of a run, after its teachers if there are any; with `calibrate.refit` again on all images."""
    teacher = _teacher_of(run) if run.recipe.distill.weight else None
    run = mapped(run)
    if teacher and run.recipe.fit.compile:
        teacher.compile()
    _fit(run, teacher)
    if run.recipe.calibrate.refit:
        run.console.print(f"training again, on all {len(run.data.train) + len(run.data.holdout)} images")
        _fit(replace(run, folder=run.folder.refit, given=run.data.whole()), teacher)


def _fit(run: Run, teacher: Teacher | None) -> None:
    """One training; with `fit.mode = "head-then-all"` the head is trained first, in its own folder."""
    begun = None
    if run.recipe.fit.mode == "head-then-all" and not run.folder.checkpoint.is_file():
        first = run.recipe.head_first()
        run.console.print(f"training neck and head first, {first.fit.epochs} epochs")
        begun = fit(mapped(replace(run, recipe=first, folder=run.folder.head, given=run.data))).cpu()
        run.console.print(f"training the whole network, {run.recipe.fit.epochs} epochs")
    fit(run, teacher, begun)


def _teacher_of(run: Run) -> Teacher | None:
    """The teachers of a run, trained if necessary; None if the run has finished and needs them no more."""
    recipe, console = run.recipe, run.console
    if not (teaching := recipe.teaching()):
        return Teacher(run)
    check_start(run)
    if is_trained(run.folder, recipe) and (not recipe.calibrate.refit or is_trained(run.folder.refit, recipe)):
        return None
    folders = run.folder.teachers(len(teaching))
    missing = [not is_trained(each, taught_by) for each, taught_by in zip(folders, teaching, strict=True)]
    for i, (taught_by, each) in enumerate(zip(teaching, folders, strict=True)):
        if missing[i]:
            which = "the teacher" if len(folders) == 1 else f"teacher {i + 1} of {len(folders)}"
            console.print(f"training {which} first: {taught_by.model.backbone}, {taught_by.fit.epochs} epochs")
        fit(replace(run, recipe=taught_by, folder=each, given=run.data))
    run.processes.wait(run.device)  # one process writes the last checkpoint
    if any(missing):
        console.print(f"training the student: {recipe.model.backbone}, {recipe.fit.epochs} epochs")
    named = recipe.distill.model_copy(update={"teacher": [each.path for each in folders]})
    return Teacher(replace(run, recipe=recipe.model_copy(update={"distill": named}), given=run.data))


def mapped(run: Run) -> Run:
    """The run with feature maps in place of images if the trunk is frozen; see `with_maps`."""
    if run.recipe.fit.mode != "frozen" or isinstance(run.data.train, LabelledMaps):
        return run
    network = build_network(run.recipe, len(run.data.classes)).to(run.device)
    return replace(run, given=with_maps(run.data, network, run.recipe, run.console))
