"""Held-out figures of a table's finished runs, by which to choose a row: python -m tests.benchmarks.held_out TABLE OUT

Accuracy and negative log-likelihood are class-balanced, of the images that training held out, with the selected scalar
and the class prior taken out: mean and standard error over the seeds, each of which holds out other images. The test
images play no part. The rows must have a normalised head.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer

from camcal.models.report import Report
from camcal.training.experiments.sweep import load_table
from camcal.training.run import RunFolder


def held_out(report: Report) -> tuple[float, float]:
    """Accuracy and negative log-likelihood."""
    assert report.scalar_curve is not None, "a normalised head is needed"
    point = min(report.scalar_curve, key=lambda each: abs(each.scalar - report.calibration.scalar))
    return point.holdout_adjusted_accuracy, point.holdout_adjusted_nll


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def main(
    table: Annotated[Path, typer.Argument(help="The table's TOML file.")],
    out: Annotated[Path, typer.Argument(help="The folder that camcal bench-table wrote.")],
    data: Annotated[list[str] | None, typer.Option(help="As for camcal bench-table.")] = None,
) -> None:
    """Print a row for each data set and method."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for job in load_table(table, data or []):
        if (path := RunFolder(out / "runs" / job.training).report).is_file():
            found[job.recipe.name, job.row.method].append(held_out(Report.read(path)))
    print("| data | method | seeds | held-out accuracy | held-out NLL |\n|---|---|---|---|---|")
    for (name, method), figures in found.items():
        accuracies, losses = zip(*figures, strict=True)
        cells = spread([100 * value for value in accuracies], 1), spread(list(losses), 3)
        print(f"| {name} | {method} | {len(figures)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
