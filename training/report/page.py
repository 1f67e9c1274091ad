"""The report as a page for people: one HTML file that needs nothing else, made from `report.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from camcal.models.report import Figures, Report, TeacherFacts
from camcal.training.recipe import Recipe
from camcal.training.report import charts
from camcal.training.report.summary import (
    candidate_rows,
    errors,
    groups_shown,
    has_margins,
    percent,
    recipe_in,
    reservations,
    steps_for_prior,
    steps_taken,
)

FOLDER = Path(__file__).parent
TEMPLATE = "page.html.jinja"
ERRORS = ("ECE", "95 %", "by chance", "debiased")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: its name, its cells, and a CSS class."""

    name: str
    cells: Sequence[str]
    style: str = ""


def page(report: Report) -> str:
    """The whole page, UTF-8 text."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["percent"] = percent
    recipe = recipe_in(report)
    return environment.get_template(TEMPLATE).render(
        report=report,
        recipe=recipe,
        recipe_toml=_toml(report.settings),
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        charts=charts,
        reservations=reservations(report),
        steps=steps_taken(report),
        figure_columns=["", "top-1", *_sizes(report.data.groups), *ERRORS, "class-wise", "NLL", "Brier"],
        balanced=_balanced(report),
        under_train=_under_train(report),
        under_given=_under_given(report),
        every_class=_every_class(report),
        group_columns=["", "share", "confidence", "accuracy", *ERRORS],
        candidates=_candidates(report),
        has_margins=has_margins(report),
        by_predicted_group=_by_predicted_group(report),
        train_counts={row.name: row.train_count for row in report.per_class},
        facts=_facts(report, recipe),
    )


def _sizes(groups: dict[str, int]) -> list[str]:
    return [f"{group} ({size})" for group, size in groups.items()]


def _figures_row(name: str, f: Figures, style: str = "") -> Row:
    cells = [percent(f.accuracy), *map(percent, f.groups.values()), *errors(f), percent(f.classwise_ece, 2)]
    return Row(name=name, cells=[*cells, f"{f.nll:.3f}", f"{f.brier:.3f}"], style=style)


def _balanced(report: Report) -> list[Row]:
    alone = report.temperature_only
    rows = [_figures_row(name, report.test[step]) for step, name in steps_taken(report).items()]
    rows.append(_figures_row("temperature only", alone["scalar"].test, "aside"))
    if has_margins(report):
        rows.append(_figures_row("− log prior", report.test["adjusted"], "aside"))
        rows.append(_figures_row("− log prior, temperature", alone["adjusted"].test, "aside"))
    return rows


def _under_train(report: Report) -> list[Row]:
    return [_figures_row(name, report.test_under_train_prior[step]) for step, name in steps_for_prior(report).items()]


def _under_given(report: Report) -> list[Row]:
    names = steps_for_prior(report)
    return [_figures_row(names[step], f) for step, f in (report.test_under_given_prior or {}).items()]


def _candidates(report: Report) -> list[Row]:
    rows = candidate_rows(report)
    served = f"{report.calibration.method} (served)"
    return [Row(name=name, cells=cells, style="" if name == served else "aside") for name, *cells in rows]


def _every_class(report: Report) -> list[Row]:
    return [
        Row(
            name=row.name,
            cells=[
                f"{row.train_count:,}",
                row.group,
                f"{row.test_count:,}",
                percent(row.accuracy_trained),
                percent(row.accuracy_calibrated),
            ],
        )
        for row in sorted(report.per_class, key=lambda row: -row.train_count)
    ]


def _by_predicted_group(report: Report) -> list[Row]:
    rows = []
    for step, name in zip(charts.ENDS, ("as trained", "calibrated"), strict=True):
        for group, size in groups_shown(report).items():
            found = report.by_predicted_group[step][group]
            cells = ["n/a"] * 7
            if found is not None:
                cells = [*map(percent, (found.share, found.confidence, found.accuracy)), *errors(found)]
            rows.append(Row(name=f"{group} ({size}), {name}", cells=cells))
    return rows


def _facts(report: Report, recipe: Recipe) -> dict[str, str]:
    made, fitted, calibrate = report.made_with, report.calibration, recipe.calibrate
    alone = report.temperature_only["scalar"]
    trained = [
        f"{each.date} at {each.commit or 'an unknown commit'} on {each.hardware}" for each in report.trained_with
    ]
    facts = {
        "camcal": made.version,
        "commit": made.commit or "unknown (not a clone)",
        "hardware": made.hardware,
        "evaluated": made.date,
        "trained from": "; from ".join(trained),
    }
    if report.scalar_curve:
        selected = "selected on held-out images" if calibrate.scalar == "select" else "kept"
        facts["scalar"] = f"{fitted.trained_scalar:.2f} as trained, {fitted.scalar:.2f} {selected}"
    facts["calibration"] = f"{fitted.method}{', chosen by calibrate.method = auto' * (calibrate.method == 'auto')}"
    if fitted.lean:
        facts["lean"] = f"{fitted.lean:+.2f} of the logarithm of the training prior"
    without = f"; {alone.temperature:.3f} without margins" if has_margins(report) else ""
    again = "; then trained again on all" if calibrate.refit else ""
    facts["temperature"] = f"{fitted.temperature:.3f}{without}"
    facts["held out"] = f"{report.data.holdout:,} of the training images, for scalar and temperature{again}"
    last = f"the last one, {report.epochs}; the test part was not looked at before this report"
    return facts | _teachers(report.teachers) | {"epoch": last}


def _teachers(teachers: Sequence[TeacherFacts]) -> dict[str, str]:
    """The networks that this one was distilled from."""
    found = {}
    for i, teacher in enumerate(teachers, start=1):
        recipe = teacher.recipe
        found[f"teacher {i}" if len(teachers) > 1 else "teacher"] = (
            f"{recipe['model']['backbone']}, {recipe['fit']['epochs']} epochs of recipe {recipe['name']}, "
            f"{recipe['loss']['name']}; weights {teacher.weights}"
        )
    return found


def _toml(settings: dict[str, Any]) -> str:
    """A recipe's effective settings in the form that a recipe file has."""

    def value(v: Any) -> str:
        if isinstance(v, dict):
            return "{" + ", ".join(f"{value(name)} = {value(each)}" for name, each in v.items()) + "}"
        return json.dumps(v, ensure_ascii=False)  # TOML's text, numbers, booleans and lists are those of JSON

    sections = {key: section for key, section in settings.items() if isinstance(section, dict)}
    lines = [f"{k} = {value(v)}" for k, v in settings.items() if k not in sections and v is not None]
    for key, section in sections.items():
        lines += ["", f"[{key}]", *(f"{k} = {value(v)}" for k, v in section.items() if v is not None)]
    return "\n".join(lines)
