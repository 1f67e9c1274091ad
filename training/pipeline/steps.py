"""The steps from a recipe to a bundle, each of which reads what the one before left in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from camcal.models.backbones import build_backbone
from camcal.models.bundle import REPORT_FILE, Bundle, Precision
from camcal.models.report import FittedCalibration, Made, Report, ReportError, TeacherFacts
from camcal.training.calibration.calibrate import calibrate
from camcal.training.data import Dataset, load_dataset
from camcal.training.data.features import with_maps
from camcal.training.distributed import ALONE, Group, process_group
from camcal.training.fitting.distill import Teacher, load_teachers
from camcal.training.fitting.fit import check_start, fit
from camcal.training.fitting.learned_prior import balanced_twice, logit_prior
from camcal.training.priors import given_prior
from camcal.training.recipe import Recipe, parse_recipe
from camcal.training.report.evaluate import evaluate
from camcal.training.report.page import page
from camcal.training.report.summary import print_report
from camcal.training.run import (
    Run,
    RunError,
    build_network,
    check_data,
    is_trained,
    load_finished,
    load_network,
    network_tensors,
    save_json,
    save_tensors,
)


def default_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(recipe: Recipe, run: Run, console: Console) -> Bundle | None:
    """All steps. A run that was interrupted continues; a finished one is only calibrated and exported again.

    Under `torchrun` all processes train, and the leading one does the rest; the others return None.
    """
    with ExitStack() as stack:
        with process_group(default_device()) as (group, device):
            console.quiet |= not group.leads
            if recipe.distill.weight and recipe.distill.set is None:
                load_teachers(recipe)  # what is wrong with it is said before images are read
            if recipe.model.weights is not None:
                console.print(_origin(recipe))
            run.make()
            if group.leads:
                stack.enter_context(run.claimed())
            data = load(recipe, console)
            processes = f" × {group.size}" if group.size > 1 else ""
            if data.left_out:
                console.print(f"warning: {data.left_out}")
            console.print(
                f"training {recipe.model.backbone} on {len(data.train)} images of {len(data.classes)} classes, "
                f"{device.type}{processes}"
            )
            counts_K = data.train_counts()
            if (doubt := balanced_twice(logit_prior(recipe, counts_K), counts_K)) is not None:
                console.print(f"warning: {doubt}")
            began = time.perf_counter()
            data = mapped(recipe, data, device, console)
            fit_run(run, recipe, data, console, device, group)
            console.print(f"trained in {time.perf_counter() - began:.0f} s")
        if not group.leads:
            return None
        calibrate_run(run, recipe, data, console)
        evaluate_run(run, data, console)
        return export_run(run, run.bundle, console)


def _origin(recipe: Recipe) -> str:
    """A sentence about the weights that training starts from. Raises RunError if they cannot be had."""
    try:
        build_backbone(recipe.model.backbone, recipe.model.weights, recipe.data.input_size)
    except ValueError as error:
        raise RunError(f"{error}; or train without pretrained weights: camcal train photos-from-scratch") from None
    held = ", which stay as they are" if recipe.fit.mode == "frozen" else ""
    return (
        f"starting from pretrained weights of {recipe.model.backbone} ({Path(recipe.model.weights or '').name}){held}"
    )


def fit_run(
    run: Run, recipe: Recipe, data: Dataset, console: Console, device: torch.device, group: Group = ALONE
) -> None:
    """Train the network of a recipe, and first its teachers if it says so; with `calibrate.refit` a second time, on all
    images.
    """
    teacher = _teacher_of(run, recipe, data, console, device, group) if recipe.distill.weight else None
    data = mapped(recipe, data, device, console)
    if teacher and recipe.fit.compile:
        teacher.compile()
    _fit(recipe, data, run, console, device, group, teacher)
    if recipe.calibrate.refit:
        console.print(f"training again, on all {len(data.train) + len(data.holdout)} images")
        _fit(recipe, data.whole(), run.refit, console, device, group, teacher)


def _fit(
    recipe: Recipe,
    data: Dataset,
    run: Run,
    console: Console,
    device: torch.device,
    group: Group,
    teacher: Teacher | None,
) -> None:
    """One training; with `fit.mode = "head-then-all"` that of the head comes first, in a folder of its own."""
    begun = None
    if recipe.fit.mode == "head-then-all" and not run.checkpoint.is_file():
        first = recipe.head_first()
        console.print(f"training neck and head first, {first.fit.epochs} epochs")
        begun = fit(first, mapped(first, data, device, console), run.head, console, device, group).cpu()
        console.print(f"training the whole network, {recipe.fit.epochs} epochs")
    fit(recipe, data, run, console, device, group, teacher, begun)


def _teacher_of(
    run: Run, recipe: Recipe, data: Dataset, console: Console, device: torch.device, group: Group
) -> Teacher | None:
    """The teachers of a run, trained if need be; None where the run has finished and listens no more."""
    if not (teaching := recipe.teaching()):
        return Teacher(recipe, data, device)
    check_start(recipe, data, run)
    if is_trained(run, recipe) and (not recipe.calibrate.refit or is_trained(run.refit, recipe)):
        return None
    runs = run.teachers(len(teaching))
    missing = [not is_trained(each, taught_by) for each, taught_by in zip(runs, teaching, strict=True)]
    for i, (taught_by, each) in enumerate(zip(teaching, runs, strict=True)):
        if missing[i]:
            which = "the teacher" if len(runs) == 1 else f"teacher {i + 1} of {len(runs)}"
            console.print(f"training {which} first: {taught_by.model.backbone}, {taught_by.fit.epochs} epochs")
        fit(taught_by, data, each, console, device, group)
    group.wait(device)  # one process writes the last checkpoint
    if any(missing):
        console.print(f"training the network that learns: {recipe.model.backbone}, {recipe.fit.epochs} epochs")
    named = recipe.distill.model_copy(update={"teacher": [each.path for each in runs]})
    return Teacher(recipe.model_copy(update={"distill": named}), data, device)


def mapped(recipe: Recipe, data: Dataset, device: torch.device, console: Console) -> Dataset:
    """The data with the maps of the recipe's trunk where it is frozen, see `with_maps`."""
    if recipe.fit.mode != "frozen":
        return data
    return with_maps(data, build_network(recipe, len(data.classes)).to(device), recipe, console)


def load(recipe: Recipe, console: Console) -> Dataset:
    """The recipe's data; a prior in the recipe that does not fit its classes is refused here, before any work."""
    with console.status("reading images"):
        data = load_dataset(recipe.data, recipe.seed)
    if recipe.calibrate.prior is not None:
        given_prior(recipe.calibrate.prior, data.classes)
    return data


def calibrate_run(run: Run, recipe: Recipe | None, data: Dataset | None, console: Console) -> None:
    """Fit scalar, MARC, lean and temperature to the trained network; writes `network.safetensors`.

    Args:
        recipe: whose calibration settings to use; None for those that the network was trained with.
        data: the run's data; None loads it.

    Raises:
        RunError: if a training is not finished, or the data is not that of the run.
        CalibrationError: see `calibrate`.
    """
    network, trained_with, meta = load_finished(run)
    recipe = recipe or trained_with
    if recipe.calibrate.refit and not run.refit.checkpoint.is_file():
        raise RunError(
            f"{run.path} has no second training: give its `camcal train` again, with --set calibrate.refit=true"
        )
    data = with_maps(data or load(recipe, console), network.to(default_device()), recipe, console)
    check_data(run, meta, data)
    again = None
    if recipe.calibrate.refit:
        again, _, again_meta = load_finished(run.refit)
        check_data(run.refit, again_meta, data.whole())
    began = time.perf_counter()
    with console.status("calibrating"):
        fitted = calibrate(network.to(default_device()), data, recipe, kept=run.logits)
        if again is not None:
            save_tensors(run.before_refit, network_tensors(network.cpu()), meta)
            made = meta["made_with"]
            meta["made_with"] = [*made, *(one for one in again_meta["made_with"] if one not in made)]
            network = again
            fitted = calibrate(network.to(default_device()), data.whole(), recipe, fitted, run.refit.logits)
    console.print(
        f"calibrated in {time.perf_counter() - began:.0f} s{'' if fitted.logits_s else ' on kept logits'}: "
        + (f"scalar {fitted.trained_scalar:.2f} → {fitted.scalar:.2f}, " if recipe.model.head != "linear" else "")
        + (f"lean {fitted.lean:+.2f}, " if recipe.calibrate.lean else "")
        + f"temperature {fitted.temperature:.3f}"
        + (f", omega at its lower bound for {fitted.omega_at_bound} classes" if fitted.omega_at_bound else "")
    )
    for warning in fitted.warnings:
        console.print(f"warning: {warning}")
    meta |= {"recipe": recipe.model_dump(mode="json"), "calibration": fitted.model_dump()}
    save_tensors(run.network, network_tensors(network.cpu()), meta)


def evaluate_run(run: Run, data: Dataset | None, console: Console) -> Report:
    """Judge the calibrated network on the test part; writes `report.json`, and `report.html` to look at."""
    network, recipe, meta = load_network(run.network)
    device = default_device()
    data = with_maps(data or load(recipe, console), network.to(device), recipe, console)
    check_data(run, meta, data)
    before = load_network(run.before_refit)[0].to(device) if recipe.calibrate.refit else None
    with console.status("evaluating"):
        fitted = FittedCalibration.model_validate(meta["calibration"])
        report = evaluate(network.to(device), data, recipe, fitted, before, run.logits)
    report.trained_with = [Made.model_validate(made) for made in meta["made_with"]]
    report.teachers = [TeacherFacts.model_validate(teacher) for teacher in meta.get("teachers", [])]
    save_json(run.report, report.to_json())
    run.page.write_text(page(report), encoding="utf-8")
    print_report(report, console)
    return report


def export_run(
    run: Run, folder: Path, console: Console, precision: Precision = "fp32", data: Dataset | None = None
) -> Bundle:
    """Write the bundle of a calibrated and evaluated run; another precision than fp32 needs the run's data again.

    Args:
        data: the run's data; None loads it where it is needed.

    Raises:
        RunError: if there is no report of this very calibration, or the data is not that of the run.
    """
    from camcal.training.export.bundle import export_bundle  # the only step that needs onnx and onnxruntime

    network, recipe, meta = load_network(run.network)
    try:
        report = Report.read(run.report)
    except ReportError as error:
        raise RunError(f"{error}; run `camcal evaluate {run.path}` first") from None
    if report.calibration != FittedCalibration.model_validate(meta["calibration"]):
        raise RunError(f"{run.report} is of another calibration: run `camcal evaluate {run.path}` first")
    judged = None
    if precision != "fp32":
        data = data or load(recipe, console)
        check_data(run, meta, data)
        judged = load_network(run.before_refit)[0] if recipe.calibrate.refit else None
    with console.status("exporting"):
        bundle = export_bundle(
            network, recipe, meta["classes"], meta["train_counts"], report, folder, precision, data, judged
        )
    exported = Report.read(bundle.path / REPORT_FILE)
    for name, held in (exported.held_out or {}).items():
        console.print(f"{name}: accuracy {held.accuracy:.2%}, ECE {held.ece:.2%} on held-out images")
    console.print(f"bundle {bundle.manifest.name} {bundle.manifest.version} written to {folder}")
    return bundle


def recipe_of(run: Run, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run as it was calibrated last, or else trained, changed by `section.key=value` overrides."""
    _, recipe, _ = load_network(run.network if run.network.is_file() else run.checkpoint)
    return parse_recipe(recipe.model_dump(mode="json"), f"the recipe of {run.path}", overrides)
