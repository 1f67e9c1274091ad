"""The result as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from camcal.models.bundle import GROUPS
from tests.benchmarks.heatmaps.comparison import (
    ALONG,
    CENTRE,
    CORRECT,
    HALF,
    OFF,
    OURS,
    PLAIN,
    RULES,
    UNMOVED,
    VERSIONS,
    WITH,
)
from tests.benchmarks.heatmaps.localisation import MEASURES
from tests.benchmarks.heatmaps.speed import TURNS

TITLES = {
    OURS: "**camcal, calibrated**",
    PLAIN: "camcal, plain",
    UNMOVED: "camcal, calibrated, not moved back",
    HALF: "camcal, leaning by half",
    ALONG: "camcal, leaning by nothing",
    WITH: "camcal, trained with CAMC",
    OFF: "that network, CAMC switched off",
    "cam": "CAM",
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
    "scorecam": "Score-CAM",
    CENTRE: "centre baseline",
}
HEADINGS = {"given": "maps as given", "cut": "maps cut off at their median"}
LEADS = (
    "Points by which the mean of camcal's calibrated maps is ahead, with the 95 % interval of a paired bootstrap over "
    "the images"
)
PEERS = ("cam", "gradcam", "gradcam++", "layercam", "eigencam", "scorecam")
SPEED_TITLES = {
    "camcal": "camcal, as served (ONNX Runtime)",
    "camcal_int8": "camcal, as served, exported with int8",
    "camcal_torch": "camcal, PyTorch",
    "forward": "the network alone, PyTorch",
}
TARGETS = {"gradcam": 20, "scorecam": 100}

DEFINITIONS = Path(__file__).with_name("definitions.md")


def markdown(result: dict[str, Any]) -> str:
    """The page made from the JSON."""
    setup = result["setup"]
    counts = ", ".join(f"{setup['images'][group]} {group}" for group in GROUPS if group in setup["images"])
    lines = [
        "# Heatmaps against boxes",
        "",
        f"{setup['images']['all']} validation photographs of Tiny ImageNet ({counts}) with one box each, drawn at "
        f"random with seed {setup['seed']}; {setup['backbone']}, {setup['input_size']} px, maps of "
        f"{setup['grid'][0]}×{setup['grid'][1]}, trained by the recipe `{setup['recipe']}` for {setup['epochs']} "
        f"epochs. On {setup['hardware']}, pytorch-grad-cam {setup['grad_cam']}. "
        "Written by `make bench-heatmaps`.",
        "",
        f"The photographs' accuracy is {_by_group(result['accuracy']['raw'])} before calibration and "
        f"{_by_group(result['accuracy']['calibrated'])} after it (all; {', '.join(GROUPS)}).",
        "",
        "## Maps as each method gives them",
        "",
        "The class is the calibrated prediction for camcal's calibrated maps and the plain prediction for all others.",
        "",
        *_own_classes(result),
        "## Effects of method and calibration",
        "",
        "The mean of the four measures when all methods explain the same class. Down a column the class is the same "
        "and the map changes: that is CAMC, and the method. Along a row the map is the same and the class changes: "
        "that is calibration. The plain and the calibrated map of one class are one map in two units, since ω > 0: the "
        f"largest difference between the two after scaling is {result['order_changed']:.1e}.",
        "",
        *_effects(result["localisation"]["given"]),
        "",
        *(_faithfulness(result) if result.get("faithfulness") else []),
        *(_mosaics(result["mosaics"]) if result.get("mosaics") else []),
        *(_speed(result) if result.get("speed") else []),
        DEFINITIONS.read_text(encoding="utf-8"),
    ]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|---|{'---:|' * (len(header) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _by_group(values: dict[str, float]) -> str:
    parts = " / ".join(f"{_percent(values[group])} %" for group in GROUPS if group in values)
    return f"{_percent(values['all'])} % ({parts})"


def _own_rule(name: str) -> str:
    return "calibrated" if name in (OURS, UNMOVED, HALF, ALONG, WITH, OFF) else "raw"


def _groups_of(result: dict[str, Any]) -> list[str]:
    return [group for group in GROUPS if group in result["setup"]["images"]]


def _own_classes(result: dict[str, Any]) -> list[str]:
    lines = []
    for version in VERSIONS:
        localisation = result["localisation"][version]
        groups = _groups_of(result) + [CORRECT] * (CORRECT in localisation["raw"][OURS])
        rows = []
        for name, title in TITLES.items():
            if name in localisation["raw"]:
                of_group = localisation[_own_rule(name)][name]
                values = [of_group["all"][key] for key in (*MEASURES, "mean")]
                rows.append([title, *map(_percent, values + [of_group[group]["mean"] for group in groups])])
        measures = ("pointing", "energy", "MaxBoxAccV2", "PxAP", "mean", *(f"mean, {group}" for group in groups))
        lines += [*_table([f"{HEADINGS[version]}, %", *measures], rows), "", f"{LEADS}:", ""]
        lines += [*_leads(result["leads"][version], HEADINGS[version]), ""]
    return lines


def _leads(leads: dict[str, Any], heading: str) -> list[str]:
    groups = list(next(iter(leads.values())))
    rows = []
    for name, title in TITLES.items():
        if name in leads:
            found = [leads[name][group] for group in groups]
            rows.append([title, *(f"{100 * d:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for d, low, high in found)])
    return _table([f"{heading}, ahead of", *groups], rows)


def _effects(localisation: dict[str, Any]) -> list[str]:
    rows = [
        [title, *(_percent(localisation[rule][name]["all"]["mean"]) for rule in RULES)]
        for name, title in TITLES.items()
        if name in localisation["true"]
    ]
    return _table(["maps, mean of the measures, %", "true class", "plain prediction", "calibrated prediction"], rows)


def _faithfulness(result: dict[str, Any]) -> list[str]:
    groups = _groups_of(result)
    lines = [f"On {result['setup']['probes']} of the photographs, the same number of each group."]
    for version, found in result["faithfulness"].items():
        rows = []
        for name, title in TITLES.items():
            if name in found:
                values = [found[name]["all"][key] for key in ("road", "insertion", "deletion")]
                values += [found[name][group]["road"] for group in groups if group in found[name]]
                rows.append([title, *(f"{100 * value:.2f}" for value in values)])
        header = [f"{HEADINGS[version]}, %", "ROAD", "insertion", "deletion", *(f"ROAD, {group}" for group in groups)]
        lines += ["", *_table(header, rows)]
    return ["## What the prediction depends on", "", *lines, ""]


def _mosaics(found: dict[str, Any]) -> list[str]:
    groups = list(found["asked"])
    lines = [
        f"{found['mosaics']} pictures of four photographs each, of four classes that the network recognises, drawn at "
        "random from those of the highest confidence. For each class in turn: how much of the positive part of its map "
        "lies on its own photograph. A map that does not depend on the class gets 25 %."
    ]
    for version, shares in found["shares"].items():
        rows = [
            [title, *(_percent(shares[name][group]) for group in groups)]
            for name, title in TITLES.items()
            if name in shares
        ]
        lines += [
            "",
            *_table([f"{HEADINGS[version]}, %", *(f"{group} ({found['asked'][group]})" for group in groups)], rows),
        ]
    return ["## Which class a map is of", "", *lines, ""]


def _speed(result: dict[str, Any]) -> list[str]:
    found = result["speed"]
    titles, five = SPEED_TITLES | TITLES, found["five_classes"]
    rows = [
        [
            titles[name],
            *_time(value),
            f"≥ {TARGETS[name]}×" if name in TARGETS else "",
            *(_time(five[name]) if name in five else ("", "")),
        ]
        for name, value in sorted(found["methods"].items(), key=lambda item: float(item[1]["ms"]))
    ]
    words = (
        f"One image, the network's forward pass included, {found['threads']} threads. Times are medians of "
        f"{found['rounds']} rounds in which all methods take turns on the same image, in random order. Ratios are "
        f"medians of the ratio in each round. A turn is {TURNS} runs, of which the last counts, since the threads of "
        "the previous method stay awake for a while. *Five maps* is what a prediction comes with: the others get the "
        "image five times in one batch. A method without a second time has one map for all classes, or would take "
        "minutes."
    )
    header = ["", "one map, ms", "against camcal", "target", "five maps, ms", "against camcal"]
    return ["## Milliseconds per image", "", words, "", *_table(header, rows), ""]


def _time(value: dict[str, float]) -> tuple[str, str]:
    return f"{value['ms']:.2f}", f"{value['ratio']:.1f}×"
