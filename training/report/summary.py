"""The report's main figures as sentences and tables, for a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from camcal.models.bundle import GROUPS
from camcal.training.metrics import GroupCalibration

_RESCALED = {"off": "+ scalar", "tau": "+ τ-norm", "lws": "+ weight scaling"}
NAMED = 12
"""How many classes a sentence names at most."""


def steps_taken(report: dict[str, Any]) -> dict[str, str]:
    """The steps from the trained network to the served probabilities, each with the name that tables give it.

    One that changed nothing is left out, such as the scalar of a linear head. Without MARC, its place is that of the
    prior taken out.
    """
    settings = report["settings"]["calibrate"]
    names = {
        "trained": "as trained",
        "scalar": _RESCALED[settings["rescale"]],
        "marc": "+ MARC" if settings["marc"] else "− log prior",
        "calibrated": "+ lean, temperature" if settings.get("lean") else "+ temperature",
    }
    nll = {step: report["test"][step]["nll"] for step in names}
    same = {
        after
        for before, after in itertools.pairwise(["trained", "scalar", "marc"])
        if math.isclose(nll[before], nll[after], rel_tol=1e-6)
    }
    return {step: name for step, name in names.items() if step not in same}


def steps_for_prior(report: dict[str, Any]) -> dict[str, str]:
    """The same for another prior than the balanced one, where all of calibration is one step."""
    names = steps_taken(report)
    if names.pop("marc", "") == "+ MARC":
        names["calibrated"] = f"+ MARC, {names['calibrated'].removeprefix('+ ')}"
    return names


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report's main figures as tables; all but NLL and Brier score are in percent."""
    d = report["data"]
    console.print(
        f"{report['recipe']}: {d['classes']} classes, {d['train'] + d['holdout']} training images "
        f"({d['largest_class']} to {d['smallest_class']} a class), {d['holdout']} of them held out"
        f"{' at first' if report['settings']['calibrate']['refit'] else ''}, {d['test']} for the test"
    )
    balanced = {name: report["test"][step] for step, name in steps_taken(report).items()}
    if report["settings"]["calibrate"]["marc"]:
        balanced["− log prior alone"] = report["test"]["adjusted"]
    console.print(figures_table("test weighted evenly over the classes, balanced prior", d["groups"], balanced))
    for words in reservations(report):
        console.print(words)
    by_group = report["by_predicted_group"]
    console.print(group_table(report, {"as trained": by_group["trained"], "calibrated": by_group["calibrated"]}))
    names = steps_for_prior(report)
    under_train = {name: report["test_under_train_prior"][step] for step, name in names.items()}
    console.print(figures_table("test weighted to the training frequencies, training prior", d["groups"], under_train))
    if given := report.get("test_under_given_prior"):
        under_given = {names[step]: figures for step, figures in given.items()}
        console.print(figures_table("test weighted to the given prior, probabilities for it", d["groups"], under_given))


def reservations(report: dict[str, Any]) -> list[str]:
    """Sentences about what the test part is too small to show; none where it is large enough."""
    found = []
    untested = [row["class"] for row in report["per_class"] if row["accuracy_trained"] is None]
    if untested:
        shown = ", ".join(untested[:NAMED]) + (", …" if len(untested) > NAMED else "")
        found.append(f"No figure counts the classes without a test image ({len(untested)}): {shown}.")
    chance = report.get("by_chance")  # absent from older reports
    if chance and chance["ece"] > report["test"]["calibrated"]["ece"] / 2:
        found.append(
            f"The test images tell as much as {chance['samples']:.0f} of equal weight would: perfect probabilities "
            f"would show an ECE of {100 * chance['ece']:.1f} % on them by chance."
        )
    return found


def figures_table(title: str, groups: dict[str, int], rows: dict[str, dict[str, Any]]) -> Table:
    """Figures by row; all but NLL and Brier score are in percent. `groups` says how many classes each has."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for name in ("top-1", *(f"{group} ({groups[group]})" for group in GROUPS), "ECE", "cwECE", "NLL", "Brier"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in rows.items():
        table.add_row(name, *_row(figures))
    return table


def groups_shown(report: dict[str, Any]) -> dict[str, int]:
    """The groups by count and how many classes each has, or those by rank where one of the former has none."""
    by_count: dict[str, int] = report["data"]["groups"]
    by_rank: dict[str, int] = report["rank_groups"]["sizes"]
    return by_count if all(by_count.values()) else by_rank


def group_table(report: dict[str, Any], steps: Mapping[str, Mapping[str, GroupCalibration | None]]) -> Table:
    """Of each step, how the predictions of each group's classes do, in percent."""
    title = "predictions by the group of the class they name: mean confidence → accuracy (ECE)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column()
    sizes = groups_shown(report)
    for group, size in sizes.items():
        table.add_column(f"{group} ({size})", justify="right", no_wrap=True)
    for step, found in steps.items():
        table.add_row(step, *(_believed(found[group]) for group in sizes))
    return table


def _believed(f: GroupCalibration | None) -> str:
    if f is None:
        return "none"
    return f"{100 * f['confidence']:.1f} → {100 * f['accuracy']:.1f} ({100 * f['ece']:.1f})"


def _row(f: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}"

    parts = [percent(f["accuracy"]), *(percent(f["groups"][group]) for group in GROUPS)]
    return [*parts, percent(f["ece"]), f"{100 * f['classwise_ece']:.2f}", f"{f['nll']:.3f}", f"{f['brier']:.3f}"]
