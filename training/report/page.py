"""The report as a page for people: one HTML file that needs nothing else, made from `report.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from camcal.models.report import ClassFigures, Figures, Report, TeacherFacts
from camcal.training.report import plots
from camcal.training.report.plots import Point, Series
from camcal.training.report.summary import groups_shown, recipe_in, reservations, steps_for_prior, steps_taken

_STYLE = Path(__file__).with_name("page.css")
_KEY = (
    '<div class="key"><span><i class="trained"></i>as trained</span>'
    '<span><i class="calibrated"></i>calibrated</span></div>'
)
End = Literal["trained", "calibrated"]
_ENDS: tuple[End, ...] = ("trained", "calibrated")
_COUNT = "training images of the class (logarithmic)"


def page(report: Report) -> str:
    """The whole page, UTF-8 text."""
    name = escape(report.recipe)
    sections = (_head, _steps, _classes, _trust, _scalar, _margins, _worst, _making)
    body = "\n".join(section(report) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · camcal report</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _percent(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def _head(report: Report) -> str:
    data, test = report.data, report.test
    before, after = test["trained"], test["calibrated"]
    ratio = data.largest_class / data.smallest_class
    about = (
        f"{data.classes} classes, {data.train + data.holdout:,} training images, from "
        f"{data.largest_class:,} down to {data.smallest_class:,} a class (imbalance {ratio:.0f}); "
        f"{recipe_in(report).model.backbone}, {report.epochs} epochs, seed {report.seed}"
    )
    rare = _rare_group(report)
    prior = report.test_under_train_prior
    tiles = [
        _tile("Top-1 accuracy, %", before.accuracy, after.accuracy, 100, 1, up=True),
        _tile(rare[0], rare[1], rare[2], 100, 1, up=True),
        _tile("Calibration error (ECE), %", before.ece, after.ece, 100, 1, up=False),
        _tile("ECE, training prior, %", prior["trained"].ece, prior["calibrated"].ece, 100, 1, up=False),
    ]
    lead = (
        f"Of {data.test:,} test images, weighted evenly over the classes, {_percent(after.accuracy)} % are "
        f"recognised after calibration, {_percent(before.accuracy)} % before it. A prediction's probability is off "
        f"by {_percent(after.ece)} points on average; it was {_percent(before.ece)}. "
        + escape(" ".join(reservations(report)))
    )
    return (
        f'<header><p class="about">camcal report</p><h1>{escape(report.recipe)}</h1>'
        f'<p class="about">{escape(about)}</p><p class="lead">{lead}</p></header>'
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _rare_group(report: Report) -> tuple[str, float | None, float | None]:
    """The rarest classes that exist: a title, and their accuracy before and after."""
    test, ranks = report.test, report.rank_groups
    if report.data.groups["few"]:
        title = f"Few-shot classes ({report.data.groups['few']}), %"
        return title, test["trained"].groups["few"], test["calibrated"].groups["few"]
    title = f"The {ranks.sizes['tail']} rarest classes, %"
    return title, ranks.test["trained"]["tail"], ranks.test["calibrated"]["tail"]


def _tile(title: str, before: float | None, after: float | None, scale: float, digits: int, *, up: bool) -> str:
    if before is None or after is None:
        return f'<div class="tile"><b>{escape(title)}</b><span class="to">n/a</span></div>'
    change = scale * (after - before)
    verdict = "soft" if abs(change) < 0.5 * 10**-digits else "good" if (change > 0) == up else "bad"
    sign = "−" if change < 0 else "+"
    return (
        f'<div class="tile"><b>{escape(title)}</b><span class="from">{scale * before:.{digits}f} → </span>'
        f'<span class="to">{scale * after:.{digits}f}</span>'
        f'<small class="{verdict}">{sign}{abs(change):.{digits}f} points</small></div>'
    )


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str], str]]) -> str:
    """A table of numbers; a row is its name, its cells, and a CSS class."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for name, cells, style in rows:
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="{style}"><th scope="row">{escape(name)}</th>{body}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="card">{table}</div>'


def _steps(report: Report) -> str:
    sizes, marc = report.data.groups, recipe_in(report).calibrate.marc
    columns = ["", "top-1", *(f"{g} ({sizes[g]})" for g in sizes), "ECE", "class-wise", "NLL", "Brier"]

    def row(name: str, f: Figures, style: str = "") -> tuple[str, list[str], str]:
        cells = [_percent(f.accuracy), *(_percent(f.groups[g]) for g in sizes), _percent(f.ece)]
        return name, [*cells, _percent(f.classwise_ece, 2), f"{f.nll:.3f}", f"{f.brier:.3f}"], style

    balanced = [row(name, report.test[step]) for step, name in steps_taken(report).items()]
    alone, names = report.temperature_only, steps_for_prior(report)
    balanced.append(row("temperature only", alone["scalar"].test, "aside"))
    if marc:
        balanced.append(row("− log prior", report.test["adjusted"], "aside"))
        balanced.append(row("− log prior, temperature", alone["adjusted"].test, "aside"))
    prior = [row(name, report.test_under_train_prior[step]) for step, name in names.items()]
    aside = "The grey row has a temperature alone."
    if marc:
        aside = (
            "The grey rows leave MARC out: a temperature alone, and the logarithm of the class prior taken from the "
            "logits, without and with a temperature."
        )
    text = (
        "<h2>Step by step</h2><p>The test part with every class weighing the same. Accuracies and calibration errors "
        "in percent; many-shot classes have more than 100 training images, few-shot ones fewer than 20, and a group's "
        f"accuracy is the mean over its classes. {aside}</p>"
        + _table(columns, balanced)
        + "<p>The same images weighted to the training frequencies, and probabilities for that prior: what to expect "
        "where the world is as unbalanced as the training data.</p>" + _table(columns, prior)
    )
    if given := report.test_under_given_prior:
        rows = [row(names[step], f) for step, f in given.items()]
        text += "<p>And weighted to the prior that the recipe gives, probabilities for it.</p>" + _table(columns, rows)
    return text


def _classes(report: Report) -> str:
    test, ranks = report.test, report.rank_groups
    names = [f"{g}\n{n}" for g, n in [*report.data.groups.items(), *ranks.sizes.items()]]
    values = [(step, [_scaled(v) for v in [*test[step].groups.values(), *ranks.test[step].values()]]) for step in _ENDS]
    groups = plots.bars("Accuracy of each group of classes, as trained and calibrated", names, values, "accuracy, %")
    rows = report.per_class
    x = plots.log_axis(_COUNT, [row.train_count for row in rows])
    y = plots.percent_axis("accuracy, %")
    few = len(rows) <= 30
    series = [Series(style=step, trend=not few, points=_accuracy_points(rows, step)) for step in _ENDS]
    each = plots.scatter("Accuracy of each class against its training images", x, y, series, link=few)
    return (
        "<h2>Who gains</h2><p>A long tail teaches a network to answer with common classes. Calibration should lift the "
        f"rare ones (left in the first plot) and cost the common ones little.</p>{_KEY}"
        '<div class="plots">'
        + _figure("Every class", "Accuracy against training images; point at a dot for its class.", each)
        + _figure(
            "By group",
            "By training images, and by rank (36, 35 and 29 % of the classes); below, how many classes.",
            groups,
        )
        + f"</div>{_every_class(rows)}"
    )


def _scaled(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _accuracy_points(rows: Sequence[ClassFigures], step: End) -> list[Point]:
    """A point for each class that has test images; the tooltip names the class."""
    found = [(row, row.accuracy_trained if step == "trained" else row.accuracy_calibrated) for row in rows]
    return [_point(row, 100 * accuracy) for row, accuracy in found if accuracy is not None]


def _margin_points(rows: Sequence[ClassFigures], step: End) -> list[Point]:
    found = [
        (row, row.margin_trained, row.margin_spread_trained)
        if step == "trained"
        else (row, row.margin_calibrated, row.margin_spread_calibrated)
        for row in rows
    ]
    return [_point(row, margin, spread or 0.0) for row, margin, spread in found if margin is not None]


def _point(row: ClassFigures, value: float, spread: float = 0.0) -> Point:
    tip = f"{row.name}: {value:.3g}, {row.train_count} training images"
    return Point(x=row.train_count, y=value, spread=spread, tip=tip)


def _figure(title: str, caption: str, svg: str) -> str:
    return f"<figure><figcaption><strong>{escape(title)}</strong>{escape(caption)}</figcaption>{svg}</figure>"


def _every_class(rows: Sequence[ClassFigures]) -> str:
    ordered = sorted(rows, key=lambda row: -row.train_count)
    cells = [
        (
            row.name,
            [
                f"{row.train_count:,}",
                row.group,
                f"{row.test_count:,}",
                _percent(row.accuracy_trained),
                _percent(row.accuracy_calibrated),
            ],
            "",
        )
        for row in ordered
    ]
    table = _table(["class", "training images", "group", "test images", "as trained, %", "calibrated, %"], cells)
    return f"<details><summary>All {len(rows)} classes as a table</summary>{table}</details>"


def _trust(report: Report) -> str:
    figures = []
    for step, name in steps_taken(report).items():
        ece = _percent(report.test[step].ece)
        style = "calibrated" if step == "calibrated" else "trained"
        svg = plots.reliability(f"Reliability diagram, {name}, balanced prior", report.reliability[step], style)
        figures.append(_figure(name, f"balanced prior, ECE {ece}\u00a0%", svg))
    names = steps_for_prior(report)
    for step in _ENDS:
        ece = _percent(report.test_under_train_prior[step].ece)
        bins = report.reliability_under_train_prior[step]
        svg = plots.reliability(f"Reliability diagram, {names[step]}, training prior", bins, step)
        figures.append(_figure(names[step], f"training prior, ECE {ece}\u00a0%", svg))
    return (
        "<h2>Can the probabilities be believed?</h2><p>Of all predictions given with 80 % confidence, 80 % should be "
        "right: bars that end on the dashed line. The shaded part is the gap; above it a prediction was too timid, "
        "below it too sure. The grey bars underneath say how many predictions fall into each of the 15 bins.</p>"
        f'<div class="plots small">{"".join(figures)}</div>' + _by_predicted_group(report)
    )


def _by_predicted_group(report: Report) -> str:
    """How sure and how right predictions of each group's classes are."""
    rows = []
    for step, name in zip(_ENDS, ("as trained", "calibrated"), strict=True):
        for group, size in groups_shown(report).items():
            found = report.by_predicted_group[step][group]
            figures = (None,) * 4 if found is None else (found.share, found.confidence, found.accuracy, found.ece)
            cells = [_percent(figure) for figure in figures]
            rows.append((f"{group} ({size}), {name}", cells, ""))
    columns = ["", "of all", "confidence", "right", "ECE"]
    return (
        "<p>The same by the group of the class that is predicted, which is what a user knows: of all predictions how "
        "many name a class of the group, how sure they are on average, and how many of them are right, in percent. "
        "Probabilities that can be believed are as sure as they are right in every row.</p>" + _table(columns, rows)
    )


def _scalar(report: Report) -> str:
    """Accuracy and calibration error against the scalar, where the head has one."""
    curve = report.scalar_curve
    if not curve:
        return ""
    x = plots.log_axis("scalar (logarithmic)", [point.scalar for point in curve])
    even = all(math.isclose(point.nll, point.adjusted_nll, rel_tol=1e-6) for point in curve)
    figures = []
    for column, name, plain in (("accuracy", "Accuracy", False), ("ece", "Calibration error", not even)):
        shown = [("calibrated", f"adjusted_{column}"), ("held-out", f"holdout_adjusted_{column}")]
        shown += [("trained", column)] * plain
        series = [
            Series(
                style=style,
                points=[
                    Point(x=p.scalar, y=100 * value, tip=f"scalar {p.scalar:.3g}: {100 * value:.1f} %")
                    for p, value in ((p, getattr(p, key)) for p in curve)
                ],
            )
            for style, key in shown
        ]
        y = plots.linear_axis(f"{name.lower()}, %", [0.0, *(p.y for one in series for p in one.points)])
        svg = plots.lines(f"{name} against the scalar", x, y, series, mark=report.calibration.scalar)
        words = f"Test (filled) and held-out part (dashed){'' if even else ', the class prior taken out'}"
        words += "; as it is: test (hollow)." if plain else "."
        figures.append(_figure(name, words, svg))
    selected = ", selected on held-out training images" * (recipe_in(report).calibrate.scalar == "select")
    return (
        "<h2>The scalar</h2><p>A normalised classifier needs a number to multiply its cosines with. It alone changes "
        "how sure a prediction is, not which; with the class prior taken out of the logits it decides both. The dashed "
        f"line is the one in use{selected}; the curves of the test part are for information alone.</p>"
        f'<div class="plots">{"".join(figures)}</div>'
    )


def _margins(report: Report) -> str:
    rows = report.per_class
    x = plots.log_axis(_COUNT, [row.train_count for row in rows])
    figures = []
    calibrate, moved = recipe_in(report).calibrate, "marc" in steps_taken(report)
    shown: list[tuple[End, str]] = [("trained", "Before calibration"), ("calibrated", "After calibration")]
    for step, name in shown if moved else shown[:1]:
        points = _margin_points(rows, step)
        ends = [end for p in points for end in (p.y - p.spread, p.y + p.spread)]
        y = plots.linear_axis("margin", ends)
        series = [Series(style=step, points=points, trend=len(rows) > 30)]
        svg = plots.scatter(f"{name}: margin of each class against its training images", x, y, series)
        figures.append(_figure(name, "Mean over the class's test images, ± one standard deviation.", svg))
    after = "ω·d + β after margin calibration" if calibrate.marc else "moved by the logarithm of the class prior after"
    after += ", before the lean" * calibrate.lean
    return (
        "<h2>Margins</h2><p>How far an image lies on its own class's side of that class's plane: d = z/‖W‖"
        f"{f' before, {after}' * moved}. Trained on a long tail, rare classes keep a smaller margin"
        f"{'; MARC’s two numbers for each class move and stretch them' * calibrate.marc}.</p>"
        f'<div class="plots">{"".join(figures)}</div>'
    )


def _worst(report: Report) -> str:
    if not report.worst_classes:
        return "<h2>Hardest classes</h2><p>None: every test image is recognised.</p>"
    counts = {row.name: row.train_count for row in report.per_class}
    lines = []
    for row in report.worst_classes:
        taken = ", ".join(f"{escape(other.name)} {_percent(other.share, 0)} %" for other in row.taken_for)
        share = 100 * row.accuracy
        lines.append(
            f'<tr><th scope="row">{escape(row.name)}</th><td>{counts[row.name]:,}</td>'
            f'<td>{share:.0f} %<span class="meter"><i style="width:{share:.0f}%"></i></span></td>'
            f'<td class="left">{taken}</td></tr>'
        )
    head = (
        '<tr><th>class</th><th>training images</th><th>recognised</th><th style="text-align:left">taken for</th></tr>'
    )
    table = f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"
    return (
        "<h2>Hardest classes</h2><p>The lowest accuracies after calibration, and what these images are most often "
        f'taken for.</p><div class="card">{table}</div>'
    )


def _making(report: Report) -> str:
    made, fitted, calibrate = report.made_with, report.calibration, recipe_in(report).calibrate
    alone, scalar = report.temperature_only["scalar"], {}
    if report.scalar_curve:
        selected = "selected on held-out images" if calibrate.scalar == "select" else "kept"
        scalar["scalar"] = f"{fitted.trained_scalar:.2f} as trained, {fitted.scalar:.2f} {selected}"
    trained = [
        f"{each.date} at {each.commit or 'an unknown commit'} on {each.hardware}" for each in report.trained_with
    ]
    facts = {
        "camcal": made.version,
        "commit": made.commit or "unknown (not a clone)",
        "hardware": made.hardware,
        "evaluated": made.date,
        "trained from": "; from ".join(trained),
        **scalar,
        **({"lean": f"{fitted.lean:+.2f} of the logarithm of the training prior"} if calibrate.lean else {}),
        "temperature": f"{fitted.temperature:.3f}" + f"; {alone.temperature:.3f} without MARC" * calibrate.marc,
        "held out": f"{report.data.holdout:,} of the training images, for scalar and temperature"
        + "; then trained again on all" * calibrate.refit,
        **_teachers(report.teachers),
        "epoch": f"the last one, {report.epochs}; the test part was not looked at before this report",
    }
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return (
        f"<h2>How it was made</h2><dl>{listed}</dl><h3>Recipe</h3>"
        f'<div class="card"><pre>{escape(_toml(report.settings))}</pre></div>'
    )


def _teachers(teachers: Sequence[TeacherFacts]) -> dict[str, str]:
    """What taught the network, where something did."""
    said = {}
    for i, teacher in enumerate(teachers, start=1):
        recipe = teacher.recipe
        said[f"teacher {i}" if len(teachers) > 1 else "teacher"] = (
            f"{recipe['model']['backbone']}, {recipe['fit']['epochs']} epochs of recipe {recipe['name']}, "
            f"{recipe['loss']['name']}; weights {teacher.weights}"
        )
    return said


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
