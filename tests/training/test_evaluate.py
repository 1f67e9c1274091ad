import io
import json

import numpy as np
import pytest
from rich.console import Console

from training.evaluate import print_report
from training.run import Run


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
