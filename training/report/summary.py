"""The report's main figures as sentences and tables, for a terminal."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from camcal.models.bundle import GROUPS
from camcal.models.report import Figures, GroupCalibration, PriorStep, Report, Step
from camcal.training.recipe import Recipe, parse_recipe

_RESCALED = {"off": "+ scalar", "tau": "+ τ-norm", "lws": "+ weight scaling"}
NAMED = 12
"""Most classes named in a sentence."""


def recipe_in(report: Report) -> Recipe:
    """The recipe in a report, which does not say where the data lies."""
    return parse_recipe(copy.deepcopy(report.settings), "report.json", ["data.root=."])


def steps_taken(report: Report) -> dict[Step, str]:
    """The steps from the trained network to the served probabilities, each with its name in tables.

    A step that changed nothing is left out, such as the scalar of a linear head. Without MARC, its step is the class
    prior being subtracted.
    """
    settings = recipe_in(report).calibrate
    names: dict[Step, str] = {
        "trained": "as trained",
        "scalar": _RESCALED[settings.rescale],
        "marc": "+ MARC" if settings.marc else "− log prior",
        "calibrated": "+ lean, temperature" if settings.lean else "+ temperature",
    }
    nll = {step: report.test[step].nll for step in names}
    pairs: tuple[tuple[Step, Step], ...] = (("trained", "scalar"), ("scalar", "marc"))
    same = {after for before, after in pairs if math.isclose(nll[before], nll[after], rel_tol=1e-6)}
    return {step: name for step, name in names.items() if step not in same}


def steps_for_prior(report: Report) -> dict[PriorStep, str]:
    """The same for a prior other than the balanced one, where all of calibration is one step."""
    names = steps_taken(report)
    last = names["calibrated"]
    if names.get("marc") == "+ MARC":
        last = f"+ MARC, {last.removeprefix('+ ')}"
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
    if settings.marc:
        balanced["− log prior alone"] = report.test["adjusted"]
    console.print(figures_table("test weighted evenly over the classes, balanced prior", d.groups, balanced))
    for words in reservations(report):
        console.print(words)
    by_group = report.by_predicted_group
    console.print(group_table(report, {"as trained": by_group["trained"], "calibrated": by_group["calibrated"]}))
    names = steps_for_prior(report)
    under_train = {name: report.test_under_train_prior[step] for step, name in names.items()}
    console.print(figures_table("test weighted to the training frequencies, training prior", d.groups, under_train))
    if given := report.test_under_given_prior:
        under_given = {names[step]: figures for step, figures in given.items()}
        console.print(figures_table("test weighted to the given prior, probabilities for it", d.groups, under_given))


def reservations(report: Report) -> list[str]:
    """Warnings that the test part is too small for a figure; empty if it is large enough."""
    found = []
    untested = [row.name for row in report.per_class if row.accuracy_trained is None]
    if untested:
        shown = ", ".join(untested[:NAMED]) + (", …" if len(untested) > NAMED else "")
        found.append(f"Classes without a test image, which no figure includes ({len(untested)}): {shown}.")
    chance = report.by_chance
    if chance and chance.ece > report.test["calibrated"].ece / 2:
        found.append(
            f"Effective test size: {chance.samples:.0f}. Perfect probabilities would show an ECE of "
            f"{100 * chance.ece:.1f} % on so few images by chance."
        )
    return found


def figures_table(title: str, groups: dict[str, int], rows: Mapping[str, Figures]) -> Table:
    """Figures by row; all but NLL and Brier score are in percent. `groups` has the number of classes of each."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for name in ("top-1", *(f"{group} ({groups[group]})" for group in GROUPS), "ECE", "cwECE", "NLL", "Brier"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in rows.items():
        table.add_row(name, *_row(figures))
    return table


def groups_shown(report: Report) -> dict[str, int]:
    """The groups by count with their numbers of classes, or those by rank if a group by count is empty."""
    by_count = report.data.groups
    return by_count if all(by_count.values()) else report.rank_groups.sizes


def group_table(report: Report, steps: Mapping[str, Mapping[str, GroupCalibration | None]]) -> Table:
    """For each step, confidence, accuracy and ECE of the predictions of each group, in percent."""
    title = "by group of the predicted class: mean confidence → accuracy (ECE)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column()
    sizes = groups_shown(report)
    for group, size in sizes.items():
        table.add_column(f"{group} ({size})", justify="right", no_wrap=True)
    for step, found in steps.items():
        table.add_row(step, *(_reliability(found[group]) for group in sizes))
    return table


def _reliability(f: GroupCalibration | None) -> str:
    if f is None:
        return "none"
    return f"{100 * f.confidence:.1f} → {100 * f.accuracy:.1f} ({100 * f.ece:.1f})"


def _row(f: Figures) -> list[str]:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}"

    parts = [percent(f.accuracy), *(percent(f.groups[group]) for group in GROUPS)]
    return [*parts, percent(f.ece), f"{100 * f.classwise_ece:.2f}", f"{f.nll:.3f}", f"{f.brier:.3f}"]
