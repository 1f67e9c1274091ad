import json
from pathlib import Path

import pytest

from camcal.models.report import Report, ReportError, ServedReport

PRETRAINED = Path(__file__).resolve().parents[2] / "models" / "pretrained"


def test_a_report_comes_back_as_it_was_written(digits_bundle: Path) -> None:
    path = digits_bundle / "report.json"
    assert json.dumps(Report.read(path).to_json()) == json.dumps(json.loads(path.read_text()))


def test_what_does_not_apply_is_left_out(digits_bundle: Path) -> None:
    report = Report.read(digits_bundle / "report.json")
    assert report.scalar_curve and not report.teachers and report.held_out is None
    assert not {"teachers", "held_out", "test_under_given_prior"} & report.to_json().keys()
    report.scalar_curve = None
    assert "scalar_curve" not in report.to_json()


@pytest.mark.parametrize("folder", sorted(path.name for path in PRETRAINED.iterdir() if path.is_dir()))
def test_shipped_reports_can_be_read(folder: str) -> None:
    path = PRETRAINED / folder / "report.json"
    report, raw = Report.read(path), json.loads(path.read_text())
    assert report.data.classes == len(report.per_class)
    assert report.per_class[0].name == raw["per_class"][0]["class"]
    served = ServedReport.model_validate(raw)
    assert served.model_dump(mode="json") == {name: raw[name] for name in ("reliability", "by_predicted_group")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "report.json is missing"),
        (b"{", "report.json is not a report: the file: Invalid JSON"),
        (b"{}", "report.json is not a report: recipe: Field required"),
        (b"\xff", "report.json is not a report: the file: Invalid JSON"),
    ],
)
def test_another_file_is_not_a_report(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReportError, match=message):
        Report.read(path)
