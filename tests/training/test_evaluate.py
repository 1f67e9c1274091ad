import io
import json

import numpy as np
import pytest
from rich.console import Console

from training.config import LossConfig, Recipe
from training.data import load_dataset
from training.evaluate import evaluate, print_report
from training.run import Run, load_network


def test_the_report_of_a_real_run(digits_run: Run) -> None:
    report = json.loads(digits_run.report.read_text())
    assert report["data"]["train"] + report["data"]["holdout"] == 527 and report["data"]["test"] == 400
    assert report["data"]["groups"] == {"many": 1, "medium": 7, "few": 2}
    test = report["test"]
    assert list(test) == ["trained", "adjusted", "scalar", "marc", "calibrated"]
    assert test["trained"]["accuracy"] == test["scalar"]["accuracy"]
    assert test["marc"]["accuracy"] == test["calibrated"]["accuracy"] > 0.6
    assert test["calibrated"]["groups"]["few"] > test["trained"]["groups"]["few"]
    per_class = [row["accuracy_calibrated"] for row in report["per_class"]]
    assert np.mean(per_class) == pytest.approx(test["calibrated"]["accuracy"], abs=1e-3)
    assert sum(b["share"] for b in report["reliability"]["calibrated"]) == pytest.approx(1)


def test_the_printed_report_has_groups_and_calibration_before_and_after(digits_run: Run) -> None:
    console = Console(file=io.StringIO(), width=80)
    report = json.loads(digits_run.report.read_text())
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for word in ("many (1)", "medium (7)", "few (2)", "ECE", "as trained", "+ MARC", "training prior"):
        assert word in text
    assert f"{100 * report['test']['calibrated']['ece']:.1f}" in text


def test_an_empty_group_is_not_zero(digits_run: Run) -> None:
    console = Console(file=io.StringIO(), width=80)
    report = json.loads(digits_run.report.read_text())
    report["test"]["trained"]["groups"]["few"] = None
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    assert "n/a" in console.file.getvalue()


def test_the_report_has_the_curve_of_the_scalar(digits_run: Run) -> None:
    report = json.loads(digits_run.report.read_text())
    curve = report["scalar_curve"]
    assert len(curve) == 15 and {len(point) for point in curve} == {13}
    assert {point["accuracy"] for point in curve} == {report["test"]["trained"]["accuracy"]}
    best = min(curve, key=lambda point: point["nll"])
    near = min(curve, key=lambda point: abs(np.log(point["scalar"] / report["calibration"]["scalar"])))
    assert near["nll"] < 1.5 * best["nll"]
    assert abs(near["ece"] - report["test"]["scalar"]["ece"]) < 0.05
    assert abs(near["adjusted_accuracy"] - report["test"]["adjusted"]["accuracy"]) < 0.05


def test_a_given_prior_is_judged_as_the_training_prior_is(digits_run: Run, digits_recipe: Recipe) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    counts = [float(n) for n in meta["train_counts"]]
    by_name = dict(zip(meta["classes"], counts, strict=True))
    given = recipe.model_copy(update={"calibrate": recipe.calibrate.model_copy(update={"prior": by_name})})
    report = evaluate(network, data, given)
    assert report["test_under_given_prior"]["calibrated"] == report["test_under_train_prior"]["calibrated"]
    assert "test_under_given_prior" not in json.loads(digits_run.report.read_text())


def test_raw_probabilities_of_balanced_training_are_shifted_to_the_training_prior(
    digits_run: Run, digits_recipe: Recipe
) -> None:
    network, recipe, _ = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    balanced = recipe.model_copy(update={"loss": LossConfig(name="balanced_softmax")})
    plain, shifted = evaluate(network, data, recipe), evaluate(network, data, balanced)
    assert plain["test"]["trained"] == shifted["test"]["trained"]
    assert shifted["test"]["adjusted"]["accuracy"] == shifted["test"]["scalar"]["accuracy"]
    few = [r["test_under_train_prior"]["trained"]["groups"]["few"] for r in (plain, shifted)]
    assert (
        few[1] <= few[0] and plain["test_under_train_prior"]["trained"] != shifted["test_under_train_prior"]["trained"]
    )
