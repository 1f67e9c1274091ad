import re
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from camcal.models.report import ClassFigures, CurvePoint, Made, Report, Step, WorstClass
from camcal.training.recipe import parse_recipe
from camcal.training.report.page import page
from camcal.training.run import RunFolder

VOID = {"meta", "br"}


class _Reader(HTMLParser):
    """Checks that tags are balanced, and collects texts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


@pytest.fixture
def report(digits_run: RunFolder) -> Report:
    return Report.read(digits_run.report)


def test_the_run_has_the_page_of_its_report_and_the_bundle_has_not(digits_run: RunFolder, report: Report) -> None:
    assert digits_run.page.read_text(encoding="utf-8") == page(report)
    names = ["canary.json", "manifest.json", "model.onnx", "report.json"]
    assert sorted(p.name for p in digits_run.bundle.iterdir()) == names


def test_the_page_is_well_formed_and_loads_nothing(report: Report) -> None:
    reader = _read(page(report))
    loading = [(name, value) for name, value in reader.attributes if name in ("src", "href", "srcset", "action")]
    assert loading == []
    assert "url(" not in page(report) and "@import" not in page(report) and "<script" not in page(report)


def test_every_plot_is_an_svg_with_a_description(report: Report) -> None:
    plots = re.findall(r"<svg.*?</svg>", page(report))
    assert len(plots) == 12
    labels = [ET.fromstring(plot).attrib["aria-label"] for plot in plots]
    assert len(set(labels)) == len(labels) and all(labels)


def test_the_page_shows_the_reports_figures(report: Report) -> None:
    text = " ".join(" ".join(_read(page(report)).words).split())
    steps: tuple[Step, ...] = ("trained", "scalar", "marc", "calibrated")
    for step in steps:
        figures = report.test[step]
        assert f"{100 * figures.accuracy:.1f}" in text and f"{figures.nll:.3f}" in text
        assert f"balanced prior, ECE {100 * figures.ece:.1f} % ({100 * figures.ece_by_chance:.1f} by chance)" in text
    assert f"{report.test['adjusted'].nll:.3f}" in text
    for word in ("Step by step", "Margins", "Hardest classes", report.made_with.hardware, "[fit]", "epochs = 12"):
        assert word in text


def test_the_page_says_how_far_each_group_is_to_be_believed(report: Report) -> None:
    columns = ("", "share", "confidence", "accuracy", "ECE", "95 %", "by chance", "debiased")
    assert f"<tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>" in page(report)
    names = {"trained": "as trained", "calibrated": "calibrated"}
    for step, groups in report.by_predicted_group.items():
        row = page(report).split(f'<th scope="row">few (2), {names[step]}</th>')[1].split("</tr>")[0]
        few = groups["few"]
        assert few is not None
        assert re.findall(r"<td>(.*?)</td>", row) == [
            *(f"{100 * figure:.1f}" for figure in (few.share, few.confidence, few.accuracy, few.ece)),
            " to ".join(f"{100 * end:.1f}" for end in few.ece_interval),
            *(f"{100 * figure:.1f}" for figure in (few.ece_by_chance, few.ece_debiased)),
        ]


def test_the_page_compares_calibrations_and_says_that_the_test_had_no_part(report: Report) -> None:
    html = page(report)
    assert "The test images had no part in the choice" in html
    row = html.split(f'<th scope="row">{report.calibration.method} (served)</th>')[1].split("</tr>")[0]
    (served,) = [each for each in report.calibration.candidates if each.method == report.calibration.method]
    test = report.candidates[served.method].test
    few = test.groups["few"]
    assert few is not None
    assert re.findall(r"<td>(.*?)</td>", row) == [
        f"{served.numbers}",
        f"{served.nll:.4f}",
        "",
        f"{test.nll:.4f}",
        *(f"{100 * figure:.1f}" for figure in (test.accuracy, few, test.ece)),
    ]
    alone = {"candidates": [served]}
    report.calibration = report.calibration.model_copy(update=alone)
    assert "Calibrations compared" not in page(report)


def test_the_page_says_where_it_was_trained(report: Report) -> None:
    words = "; from 2026-01-02 at abc on a GPU"
    assert words not in page(report)
    report.trained_with.append(Made(version="1", date="2026-01-02", commit="abc", hardware="a GPU"))
    assert words in page(report)


def test_each_class_has_its_dots(report: Report) -> None:
    scatter = page(report).split("Accuracy of each class")[1].split("</svg>")[0]
    assert scatter.count('class="dot trained"') == scatter.count('class="dot calibrated"') == 10
    assert "nine: " in scatter and "13 training images" in scatter


def test_without_a_few_shot_group_the_rarest_by_rank_are_shown(report: Report) -> None:
    report.data.groups["few"] = 0
    alone = [one.test for one in report.temperature_only.values()]
    for figures in [*report.test.values(), *alone, *report.test_under_train_prior.values()]:
        figures.groups["few"] = None
    html = page(report)
    assert "The 3 rarest classes, %" in html and "n/a" in html


def test_names_from_the_data_are_escaped(report: Report) -> None:
    rows: list[ClassFigures | WorstClass] = [*report.per_class, *report.worst_classes]
    for row in rows:
        row.name = f'<script>{row.name}("x")</script>'
    report.worst_classes[0].taken_for[0].name = "<b>"
    assert "<script" not in page(report) and "<b> " not in page(report)


def test_a_class_without_test_images_and_a_perfect_network_are_drawn(report: Report) -> None:
    for column in ("accuracy_trained", "accuracy_calibrated", "margin_trained", "margin_calibrated"):
        setattr(report.per_class[3], column, None)
    report.worst_classes = []
    html = page(report)
    assert "every test image is classified correctly" in html
    _read(html)


def test_the_curve_of_the_scalar_is_drawn_where_there_is_one(report: Report) -> None:
    names = CurvePoint.model_fields.keys() - {"scalar"}
    curve = [CurvePoint(scalar=s, **dict.fromkeys(names, 1 / s)) for s in (1.0, 4.0, 16.0)]
    report.scalar_curve = curve
    assert "with the prior: test (hollow)" not in page(report)  # nothing to take out: the two would be one
    for point in curve:
        point.nll += 1
    html = page(report)
    assert "with the prior: test (hollow)" in html
    assert "<h2>The scalar</h2>" in html and "scalar 16: 6.2 %" in html
    accuracy, error = (
        html.split(f'aria-label="{name} against the scalar"')[1].split("</svg>")[0]
        for name in ("Accuracy", "Calibration error")
    )
    assert (accuracy.count("<circle"), error.count("<circle")) == (6, 9)
    report.scalar_curve = None
    assert "<h2>The scalar</h2>" not in page(report)


def test_a_report_without_marc_does_not_speak_of_it(report: Report) -> None:
    report.calibration = report.calibration.model_copy(update={"method": "marc"})
    assert "MARC" in page(report) and "Before calibration" in page(report)
    alone = {"method": "temperature", "candidates": report.calibration.candidates[:1]}
    report.calibration = report.calibration.model_copy(update=alone)
    recipe = page(report).index("<h3>Recipe</h3>")
    assert "MARC" not in page(report)[:recipe] and "After calibration" in page(report)
    report.test["marc"] = report.test["scalar"]
    assert "After calibration" not in page(report)
    report.scalar_curve = None
    assert "<dt>scalar</dt>" not in page(report)


def test_the_recipe_on_the_page_is_a_recipe(report: Report) -> None:
    report.settings["calibrate"]["prior"] = {'the "few"': 1.5, "rest": 2e-7}
    (shown,) = [text for text in _read(page(report)).words if "[calibrate]" in text]
    assert parse_recipe(tomllib.loads(shown), "page") == parse_recipe(report.settings, "report")
