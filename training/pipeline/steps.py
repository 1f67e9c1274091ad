"""The steps after training: calibrate, evaluate, export."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from camcal.models.bundle import REPORT_FILE, Bundle, Precision
from camcal.models.report import FittedCalibration, Made, Report, ReportError, TeacherFacts
from camcal.training.calibration.calibrate import calibrate, calibrate_retrained
from camcal.training.checkpoints import (
    check_data,
    load_finished,
    load_network,
    load_tensors,
    network_tensors,
    save_json,
    save_tensors,
)
from camcal.training.data.features import with_maps
from camcal.training.recipe import Recipe, parse_recipe
from camcal.training.report.evaluate import evaluate
from camcal.training.report.page import page
from camcal.training.report.summary import comparison, print_report
from camcal.training.run import Run, RunError, RunFolder, default_device


def open_run(folder: RunFolder, console: Console, overrides: Sequence[str] = ()) -> Run:
    """A trained run with its recipe as it was calibrated last, or else trained, changed by `section.key=value`.

    Raises:
        RunError: if the folder holds no trained network.
        RecipeError: if an override is not accepted.
    """
    _, meta = load_tensors(folder.network if folder.network.is_file() else folder.checkpoint)
    recipe = parse_recipe(meta["recipe"], f"the recipe of {folder.path}", overrides)
    return Run(recipe=recipe, folder=folder, console=console, device=default_device())


def calibrate_run(run: Run) -> None:
    """Fit scalar and calibration to the trained network; writes `network.safetensors`.

    Raises:
        RunError: if a training is not finished, or the data is not that of the run.
        CalibrationError: see `calibrate`.
    """
    recipe, folder, console = run.recipe, run.folder, run.console
    network, _, meta = load_finished(folder)
    if recipe.calibrate.refit and not folder.refit.checkpoint.is_file():
        raise RunError(
            f"{folder.path} has no second training: run its `camcal train` again, with --set calibrate.refit=true"
        )
    run = replace(run, given=with_maps(run.data, network.to(run.device), recipe, console))
    check_data(folder, meta, run.data)
    began = time.perf_counter()
    with console.status("calibrating"):
        fitted = calibrate(run, network)
    if recipe.calibrate.refit:
        whole = replace(run, folder=folder.refit, given=run.data.whole())
        again, _, again_meta = load_finished(whole.folder)
        check_data(whole.folder, again_meta, whole.data)
        with console.status("calibrating"):
            fitted = calibrate_retrained(whole, again.to(run.device), fitted)
        save_tensors(
            folder.before_refit, network_tensors(network.cpu()), meta | {"recipe": recipe.model_dump(mode="json")}
        )
        made = meta["made_with"]
        meta["made_with"] = [*made, *(one for one in again_meta["made_with"] if one not in made)]
        network = again
    console.print(f"calibrated in {time.perf_counter() - began:.0f} s{_outcome(recipe, fitted)}")
    if len(fitted.candidates) > 1:
        console.print(comparison(fitted))
    for warning in fitted.warnings:
        console.print(f"warning: {warning}")
    meta |= {"recipe": recipe.model_dump(mode="json"), "calibration": fitted.model_dump()}
    save_tensors(folder.network, network_tensors(network.cpu()), meta)


def _outcome(recipe: Recipe, fitted: FittedCalibration) -> str:
    facts = []
    if recipe.model.head != "linear":
        facts.append(f"scalar {fitted.trained_scalar:.2f} → {fitted.scalar:.2f}")
    facts.append(f"method {fitted.method}")
    if fitted.lean:
        facts.append(f"lean {fitted.lean:+.2f}")
    facts.append(f"temperature {fitted.temperature:.3f}")
    if fitted.omega_at_bound:
        facts.append(f"omega at its lower bound for {fitted.omega_at_bound} classes")
    return ("" if fitted.logits_s else " on cached logits") + ": " + ", ".join(facts)


def evaluate_run(run: Run) -> Report:
    """Evaluate the calibrated network on the test part; writes `report.json`, and `report.html` to look at.

    Raises:
        RunError: if the run is not calibrated, or the data is not that of the run.
    """
    network, recipe, meta = load_network(run.folder.network)
    mapped = with_maps(run.data, network.to(run.device), recipe, run.console)
    check_data(run.folder, meta, mapped)
    run = replace(run, recipe=recipe, given=mapped)
    before = load_network(run.folder.before_refit).network.to(run.device) if recipe.calibrate.refit else None
    with run.console.status("evaluating"):
        report = evaluate(run, network, FittedCalibration.model_validate(meta["calibration"]), before)
    report.trained_with = [Made.model_validate(made) for made in meta["made_with"]]
    report.teachers = [TeacherFacts.model_validate(teacher) for teacher in meta.get("teachers", [])]
    save_json(run.folder.report, report.to_json())
    run.folder.page.write_text(page(report), encoding="utf-8")
    print_report(report, run.console)
    return report


def export_run(run: Run, out: Path | None = None, precision: Precision = "fp32") -> Bundle:
    """Write the bundle of a calibrated and evaluated run; a precision other than fp32 needs the run's data.

    Args:
        out: the bundle's folder; by default `bundle` in the run's folder.

    Raises:
        RunError: if there is no report of this very calibration, or the data is not that of the run.
    """
    from camcal.training.export.bundle import Smaller, export_bundle  # the only step that needs onnx and onnxruntime

    folder, trained = run.folder, load_network(run.folder.network)
    try:
        report = Report.read(folder.report)
    except ReportError as error:
        raise RunError(f"{error}: run `camcal evaluate {folder.path}` first") from None
    if report.calibration != FittedCalibration.model_validate(trained.meta["calibration"]):
        raise RunError(f"{folder.report} is of another calibration: run `camcal evaluate {folder.path}` first")
    smaller = None
    if precision != "fp32":
        check_data(folder, trained.meta, run.data)
        refit = trained.recipe.calibrate.refit
        judged = load_network(folder.before_refit).network if refit else None
        smaller = Smaller(precision=precision, data=run.data, judged=judged)
    with run.console.status("exporting"):
        bundle = export_bundle(trained, report, out or folder.bundle, smaller)
    for name, held in (Report.read(bundle.path / REPORT_FILE).held_out or {}).items():
        run.console.print(f"{name}: accuracy {held.accuracy:.2%}, ECE {held.ece:.2%} on held-out images")
    run.console.print(f"bundle {bundle.manifest.name} {bundle.manifest.version} written to {out or folder.bundle}")
    return bundle
