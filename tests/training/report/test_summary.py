import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from camcal.models.report import Candidate, FittedCalibration, Method, Report
from camcal.training.checkpoints import load_network
from camcal.training.data import load_dataset
from camcal.training.recipe import Recipe
from camcal.training.report.page import page
from camcal.training.report.summary import comparison, print_report, reservations, steps_for_prior, steps_taken
from camcal.training.run import RunFolder
from tests.training.runs import evaluated


def _fitted(meta: dict[str, Any]) -> FittedCalibration:
    return FittedCalibration.model_validate(meta["calibration"])


def _printed(report: Report, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_printed_report_has_groups_and_calibration_before_and_after(digits_run: RunFolder) -> None:
    report = Report.read(digits_run.report)
    text = _printed(report, width=80)
    for word in ("many (1)", "medium (7)", "few (2)", "ECE", "as trained", "training prior"):
        assert word in text
    found = [*report.test.values(), *report.test_under_train_prior.values()]
    assert text.count("calibration error") == 2 and len(found) == 8
    for step in ("trained", "scalar", "calibrated"):
        for f in (report.test[step], report.test_under_train_prior[step]):
            low, high = (f"{100 * end:.1f}" for end in f.ece_interval)
            row = f"{100 * f.ece:.1f} +{low} to {high} +{100 * f.ece_by_chance:.1f} +{100 * f.ece_debiased:.1f}"
            assert re.search(row, text), (step, row)


def test_the_printed_report_compares_calibrations_and_says_that_the_test_had_no_part(digits_run: RunFolder) -> None:
    report = Report.read(digits_run.report)
    text = _printed(report, width=100)
    assert "calibrations compared on held-out images; the test had no part in the choice" in text
    assert f"{report.calibration.method} (served)" in text
    for each in report.calibration.candidates:
        assert f"{each.nll:.4f}" in text and f"{report.candidates[each.method].test.nll:.4f}" in text
        if each.method != report.calibration.method:
            assert each.difference is not None
            assert (
                f"{'+' if each.difference > 0 else '−'}{abs(each.difference):.4f} ± {each.standard_error:.4f}" in text
            )
    report.calibration = report.calibration.model_copy(update={"candidates": report.calibration.candidates[:1]})
    assert "calibrations compared" not in _printed(report)


def test_the_comparison_is_a_sentence(digits_run: RunFolder) -> None:
    def candidate(method: Method, numbers: int, nll: float, error: float) -> Candidate:
        none: dict[str, Any] = {"lean": 0, "penalty": 0, "temperature": 1, "prior_temperatures": {}}
        apart = {"nll": nll - 0.1, "loss": nll, "difference": nll - 0.5, "standard_error": error}
        return Candidate(method=method, numbers=numbers, **apart, **none, omega=[], offset=[])

    compared = [
        candidate("temperature", 1, 0.52, 0.01),
        candidate("lean", 2, 0.5, 0.0),
        candidate("shrunk", 22, 0.49, 0.02),
    ]
    real = Report.read(digits_run.report).calibration
    fitted = real.model_copy(update={"method": "lean", "candidates": compared})
    assert comparison(fitted) == (
        "lean has a cross-fitted loss of 0.5000 (NLL 0.4000) on held-out images; temperature +0.0200 ± 0.0100; "
        "shrunk −0.0100 ± 0.0200, within its error and of more numbers"
    )


def test_the_printed_report_says_how_far_each_group_is_to_be_believed(digits_run: RunFolder) -> None:
    report = Report.read(digits_run.report)
    few = report.by_predicted_group["calibrated"]["few"]
    assert few is not None
    errors = f"{100 * few.ece:.1f}, {100 * few.ece_by_chance:.1f}"
    shown = f"{100 * few.confidence:.1f} → {100 * few.accuracy:.1f} ({errors})"
    assert shown in _printed(report, width=100)
    report.by_predicted_group["trained"]["few"] = None
    assert "none" in _printed(report)
    report.data.groups["few"] = 0
    assert "middle (4)" in _printed(report)


def test_an_empty_group_is_not_zero(digits_run: RunFolder) -> None:
    console = Console(file=io.StringIO(), width=80)
    report = Report.read(digits_run.report)
    report.test["trained"].groups["few"] = None
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    assert "n/a" in console.file.getvalue()


def test_a_step_that_changed_nothing_has_no_name(digits_run: RunFolder) -> None:
    report = Report.read(digits_run.report)
    report.calibration = report.calibration.model_copy(update={"method": "marc"})
    report.test["marc"] = report.test["calibrated"]
    assert list(steps_taken(report).values()) == ["as trained", "+ scalar", "+ MARC", "+ temperature"]
    assert list(steps_for_prior(report).values()) == ["as trained", "+ scalar", "+ MARC, temperature"]
    report.test["scalar"] = report.test["trained"]  # as of a linear head
    assert list(steps_taken(report).values()) == ["as trained", "+ MARC", "+ temperature"]
    report.calibration = report.calibration.model_copy(update={"method": "shrunk"})
    assert list(steps_for_prior(report).values()) == ["as trained", "+ shrunk margins, temperature"]
    report.calibration = report.calibration.model_copy(update={"method": "lean"})
    assert list(steps_taken(report).values()) == ["as trained", "− log prior", "+ lean, temperature"]
    alone = {"method": "temperature", "candidates": report.calibration.candidates[:1]}
    report.calibration = report.calibration.model_copy(update=alone)
    assert list(steps_taken(report).values()) == ["as trained", "− log prior", "+ temperature"]
    assert list(steps_for_prior(report).values()) == ["as trained", "+ temperature"]
    assert "MARC" not in _printed(report)
    report.test["marc"] = report.test["scalar"]  # as after a balanced loss
    assert list(steps_taken(report).values()) == ["as trained", "+ temperature"]
    report.settings["model"]["head"] = "linear"
    report.settings["calibrate"]["rescale"] = "tau"
    report.test["scalar"] = report.test["calibrated"]
    assert list(steps_taken(report).values())[1] == "+ τ-norm"


def test_training_images_are_counted_with_those_held_out(digits_run: RunFolder) -> None:
    report = Report.read(digits_run.report)
    total = sum(row.train_count for row in report.per_class)
    held = report.data.holdout
    assert f"{total} training images" in _printed(report) and f"{held} of them held out" in _printed(report)


def test_classes_without_a_test_image_are_named(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    index = np.flatnonzero(~np.isin(data.test.labels.numpy(), [2, 7]))
    report = evaluated(network, replace(data, test=data.test.subset(index)), recipe, _fitted(meta))
    assert [row.name for row in report.per_class if not row.test_count] == [data.classes[2], data.classes[7]]
    console, words = (
        Console(file=io.StringIO(), width=140),
        f"no figure includes (2): {data.classes[2]}, {data.classes[7]}.",
    )
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    assert words in console.file.getvalue()
    assert words in page(report)
    assert "without a test image" not in digits_run.page.read_text()


def test_an_error_that_few_images_show_by_chance_is_said(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    labels = data.test.labels.numpy()
    index = np.concatenate([np.flatnonzero(labels == k)[: 1 if k else 40] for k in range(10)])
    few, many = (
        evaluated(network, part, recipe, _fitted(meta)) for part in (replace(data, test=data.test.subset(index)), data)
    )
    assert few.effective_size == pytest.approx(1 / (9 / 100 + 1 / 4000))
    assert many.effective_size == pytest.approx(400)
    by_chance = few.test["calibrated"].ece_by_chance
    assert by_chance > 0.1 > many.test["calibrated"].ece_by_chance > 0
    assert reservations(few) == [
        "Effective test size: 11. Perfect probabilities would show an ECE of "
        f"{100 * by_chance:.1f} % on so few images by chance."
    ]
