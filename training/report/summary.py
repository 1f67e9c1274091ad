"""The report's main figures as sentences and tables, for a terminal."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from camcal.models.bundle import GROUPS
from camcal.models.report import (
    CalibrationErrors,
    Figures,
    FittedCalibration,
    GroupCalibration,
    Method,
    PriorStep,
    Report,
    Step,
)
from camcal.training.recipe import Recipe, parse_recipe

_MARGINS: dict[Method, str] = {
    "temperature": "− log prior",
    "lean": "− log prior",
    "marc": "+ MARC",
    "shrunk": "+ shrunk margins",
}
_RESCALED = {"off": "+ scalar", "tau": "+ τ-norm", "lws": "+ weight scaling"}
NAMED = 12
"""Most classes named in a sentence."""


def recipe_in(report: Report) -> Recipe:
    """The recipe in a report, which does not say where the data lies."""
    return parse_recipe(copy.deepcopy(report.settings), "report.json", ["data.root=."])


def steps_taken(report: Report) -> dict[Step, str]:
    """The steps from the trained network to the served probabilities, each with its name in tables.

    A step that changed nothing is left out, such as the scalar of a linear head. Without margins, their step is the
    class prior being subtracted.
    """
    settings, method = recipe_in(report).calibrate, report.calibration.method
    leaning = method == "lean" or (method == "marc" and settings.marc_lean)
    names: dict[Step, str] = {
        "trained": "as trained",
        "scalar": _RESCALED[settings.rescale],
        "marc": _MARGINS[method],
        "calibrated": "+ lean, temperature" if leaning else "+ temperature",
    }
    nll = {step: report.test[step].nll for step in names}
    pairs: tuple[tuple[Step, Step], ...] = (("trained", "scalar"), ("scalar", "marc"))
    same = {after for before, after in pairs if math.isclose(nll[before], nll[after], rel_tol=1e-6)}
    return {step: name for step, name in names.items() if step not in same}


def has_margins(report: Report) -> bool:
    """Whether a scale and a shift per class are served."""
    return report.calibration.method in ("marc", "shrunk")


def comparison(fitted: FittedCalibration) -> str:
    """A sentence about the calibrations that were compared, and by how much the chosen one is better or worse."""
    (chosen,) = [each for each in fitted.candidates if each.method == fitted.method]
    others = []
    for each in fitted.candidates:
        if each is chosen or each.difference is None or each.standard_error is None:
            continue
        tied = ", within its error and of more numbers" if each.difference <= 0 else ""
        others.append(f"{each.method} {signed(each.difference)} ± {each.standard_error:.4f}{tied}")
    found = f"{chosen.method} has a cross-fitted loss of {chosen.loss:.4f} (NLL {chosen.nll:.4f}) on held-out images"
    return f"{found}; {'; '.join(others)}"


def signed(value: float) -> str:
    """With four digits and a sign."""
    return f"{'−' if value < 0 else '+'}{abs(value):.4f}"


def steps_for_prior(report: Report) -> dict[PriorStep, str]:
    """The same for a prior other than the balanced one, where all of calibration is one step."""
    names = steps_taken(report)
    last = names["calibrated"]
    if has_margins(report) and "marc" in names:
        last = f"{names['marc']}, {last.removeprefix('+ ')}"
    found: dict[PriorStep, str] = {"trained": names["trained"]}
    if "scalar" in names:
        found["scalar"] = names["scalar"]
    return found | {"calibrated": last}


def print_report(report: Report, console: Console) -> None:
    """The report's main figures as tables; all but NLL and Brier score are in percent."""
    d, settings = report.data, recipe_in(report).calibrate
    console.print(
        f"{report.recipe}: {d.classes} classes, {d.train + d.holdout} training images "
        f"({d.largest_class} to {d.smallest_class} a class), {d.holdout} of them held out"
        f"{' at first' if settings.refit else ''}, {d.test} for the test"
    )
    balanced = {name: report.test[step] for step, name in steps_taken(report).items()}
    if has_margins(report):
        balanced["− log prior alone"] = report.test["adjusted"]
    _print_figures("test weighted evenly over the classes, balanced prior", d.groups, balanced, console)
    for words in reservations(report):
        console.print(words)
    by_group = report.by_predicted_group
    console.print(group_table(report, {"as trained": by_group["trained"], "calibrated": by_group["calibrated"]}))
    names = steps_for_prior(report)
    under_train = {name: report.test_under_train_prior[step] for step, name in names.items()}
    _print_figures("test weighted to the training frequencies, training prior", d.groups, under_train, console)
    if given := report.test_under_given_prior:
        under_given = {names[step]: figures for step, figures in given.items()}
        _print_figures("test weighted to the given prior, probabilities for it", d.groups, under_given, console)
    if len(report.calibration.candidates) > 1:
        console.print(candidates_table(report))


def _print_figures(title: str, groups: dict[str, int], rows: Mapping[str, Figures], console: Console) -> None:
    console.print(figures_table(title, groups, rows))
    console.print(errors_table(rows))


def reservations(report: Report) -> list[str]:
    """Warnings that the test part is too small for a figure; empty if it is large enough."""
    found = []
    untested = [row.name for row in report.per_class if row.accuracy_trained is None]
    if untested:
        shown = ", ".join(untested[:NAMED]) + (", …" if len(untested) > NAMED else "")
        found.append(f"Classes without a test image, which no figure includes ({len(untested)}): {shown}.")
    figures = report.test["calibrated"]
    if figures.ece_by_chance > figures.ece / 2:
        found.append(
            f"Effective test size: {report.effective_size:.0f}. Perfect probabilities would show an ECE of "
            f"{100 * figures.ece_by_chance:.1f} % on so few images by chance."
        )
    return found


def figures_table(title: str, groups: dict[str, int], rows: Mapping[str, Figures]) -> Table:
    """Figures by row; accuracies are in percent. `groups` has the number of classes of each."""
    table = _table(title, ["top-1", *(f"{group} ({groups[group]})" for group in GROUPS), "NLL", "Brier"])
    for name, f in rows.items():
        accuracies = [f.accuracy, *(f.groups[group] for group in GROUPS)]
        table.add_row(name, *map(percent, accuracies), f"{f.nll:.3f}", f"{f.brier:.3f}")
    return table


def errors_table(rows: Mapping[str, Figures]) -> Table:
    """Calibration errors by row, in percent."""
    table = _table("calibration error", ["ECE", "95 % interval", "by chance", "debiased", "class-wise"])
    for name, f in rows.items():
        table.add_row(name, *errors(f), f"{100 * f.classwise_ece:.2f}")
    return table


def errors(found: CalibrationErrors) -> list[str]:
    """ECE, its interval, its level by chance, and the debiased estimate, in percent."""
    low, high = found.ece_interval
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return [percent(found.ece), interval, percent(found.ece_by_chance), percent(found.ece_debiased)]


def candidates_table(report: Report) -> Table:
    """The calibrations that were compared, by held-out and then by test images; accuracies and ECE are in percent."""
    title = "calibrations compared on held-out images; the test had no part in the choice"
    table = _table(title, ["numbers", "NLL", "difference in loss", "test NLL", "top-1", "few", "ECE"])
    for row in candidate_rows(report):
        table.add_row(*row)
    return table


def candidate_rows(report: Report) -> list[list[str]]:
    """The rows of that table, the name of the calibration first."""
    rows = []
    for each in report.calibration.candidates:
        test = report.candidates[each.method].test
        served = each.method == report.calibration.method
        apart = "" if served or each.difference is None else f"{signed(each.difference)} ± {each.standard_error:.4f}"
        held = "n/a" if each.nll is None else f"{each.nll:.4f}"
        accuracies = map(percent, (test.accuracy, test.groups["few"], test.ece))
        name = f"{each.method}{' (served)' if served else ''}"
        rows.append([name, str(each.numbers), held, apart, f"{test.nll:.4f}", *accuracies])
    return rows


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def groups_shown(report: Report) -> dict[str, int]:
    """The groups by count with their numbers of classes, or those by rank if a group by count is empty."""
    by_count = report.data.groups
    return by_count if all(by_count.values()) else report.rank_groups.sizes


def group_table(report: Report, steps: Mapping[str, Mapping[str, GroupCalibration | None]]) -> Table:
    """For each step, confidence, accuracy and ECE of the predictions of each group, in percent."""
    sizes = groups_shown(report)
    title = "by group of the predicted class: mean confidence → accuracy (ECE, by chance)"
    table = _table(title, [f"{group} ({size})" for group, size in sizes.items()])
    for step, found in steps.items():
        table.add_row(step, *(_reliability(found[group]) for group in sizes))
    return table


def _reliability(f: GroupCalibration | None) -> str:
    if f is None:
        return "none"
    by_chance = f"{100 * f.ece:.1f}, {100 * f.ece_by_chance:.1f}"
    return f"{100 * f.confidence:.1f} → {100 * f.accuracy:.1f} ({by_chance})"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction of one in percent, without the sign."""
    return "n/a" if value is None else f"{100 * value:.{digits}f}"
