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
    (line,) = [line for line in text.splitlines() if line.startswith("cosine + MARC")]
    mean = 100 * (rows[2]["accuracy"] + 0.01)
    assert line.split()[3:5] == ["2", f"{mean:.1f}±1.4"]


def test_no_results_are_said_so() -> None:
    assert _printed([], 80) == "no results yet\n"
    assert "No results yet." in markdown([])


def test_markdown_has_a_row_for_each_method_and_links_the_file_of_each_seed(rows: list[Row]) -> None:
    text = markdown(rows)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| cosine",
        "| cosine + MARC",
        "| cosine + logit adjustment",
    ]
    assert {line.split(" | ")[1] for line in table[2:]} == {"[0](../results/s0.json) [1](../results/s1.json)"}
    assert rows[0]["hardware"] in text


def test_the_committed_table_is_made_from_the_committed_files() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "results.md"
    assert page.read_text(encoding="utf-8") == markdown(load_results(FOLDER))
