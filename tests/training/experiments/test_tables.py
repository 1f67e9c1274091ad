import io
from pathlib import Path

import pytest
from rich.console import Console

from camcal.models.report import Report
from camcal.training.checkpoints import save_json
from camcal.training.experiments.results import FOLDER, Row, load_results, result_of
from camcal.training.experiments.tables import markdown, print_results
from camcal.training.run import RunFolder


@pytest.fixture
def rows(digits_run: RunFolder, tmp_path: Path) -> list[Row]:
    """Two seeds of one method, the second made up from the first."""
    report = Report.read(digits_run.report)
    save_json(tmp_path / "s0.json", result_of(report, "cosine"))
    report.seed = 1
    report.test["calibrated"].accuracy += 0.02
    save_json(tmp_path / "s1.json", result_of(report, "cosine"))
    return load_results(tmp_path)


def _printed(rows: list[Row], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_results(rows, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_and_loses_no_figure(rows: list[Row], width: int) -> None:
    text = _printed(rows, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert ("long-tailed" in text) != ("a terminal with 92 columns also shows" in text)
    (line,) = [line for line in text.splitlines() if line.startswith("cosine + auto")]
    mean = 100 * (rows[2]["accuracy"] + 0.01)
    assert line.split()[3:5] == ["2", f"{mean:.1f}±1.4"]


def test_no_results_are_said_so() -> None:
    assert _printed([], 80) == "no results yet\n"
    assert "No results yet." in markdown([])


def test_markdown_has_a_row_for_each_method_and_links_the_file_of_each_seed(rows: list[Row]) -> None:
    text = markdown(rows)
    table = [line for line in text.partition("## Calibrations")[0].splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| cosine",
        "| cosine + auto",
        "| cosine + logit adjustment",
    ]
    assert {line.split(" | ")[1] for line in table[2:]} == {"[0](../results/s0.json) [1](../results/s1.json)"}
    assert rows[0]["hardware"] in text


def test_markdown_has_what_was_chosen_beside_what_each_calibration_gives_on_the_test(rows: list[Row]) -> None:
    for row in rows:
        if row["seed"] == 1:  # as if this seed had chosen another, which the test finds worse by 0.25
            row["candidates"] = [dict(each, served=each["method"] == "lean") for each in row["candidates"]]
            served = next(each for each in row["candidates"] if each["served"])
            served["test"] = dict(served["test"], nll=0.25 + min(c["test"]["nll"] for c in row["candidates"]))
    found = markdown(rows).partition("## Calibrations compared")[2]
    table = [line.strip("| ").split(" | ") for line in found.splitlines() if line.startswith("| cosine")]
    assert [line[1] for line in table] == ["**auto**", "temperature", "lean", "marc", "shrunk"]
    first = next(each for each in rows[0]["candidates"] if each["served"])
    served = {line[1]: line[2] for line in table}
    assert served["**auto**"] == "2" and served["lean"] == ("2" if first["method"] == "lean" else "1")
    regret = first["test"]["nll"] - min(each["test"]["nll"] for each in rows[0]["candidates"])
    assert float(table[0][6]) == pytest.approx((regret + 0.25) / 2, abs=1e-4)


def test_results_that_compared_nothing_have_no_such_section(rows: list[Row]) -> None:
    assert "## Calibrations compared" not in markdown([dict(row, candidates=[]) for row in rows])


def test_the_committed_table_is_made_from_the_committed_files() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "results.md"
    assert page.read_text(encoding="utf-8") == markdown(load_results(FOLDER))
