import pytest

from camcal.models.report import Report
from camcal.training.run import RunFolder
from tests.benchmarks.held_out import held_out, spread


def test_held_out_figures_are_those_at_the_selected_scalar(digits_run: RunFolder) -> None:
    report = Report.read(digits_run.report)
    assert report.scalar_curve is not None
    (point,) = [p for p in report.scalar_curve if p.scalar == pytest.approx(report.calibration.scalar, rel=1e-6)]
    assert held_out(report) == (point.holdout_adjusted_accuracy, point.holdout_adjusted_nll)


def test_spread_is_the_standard_error() -> None:
    assert spread([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert spread([0.5], 3) == "0.500"
