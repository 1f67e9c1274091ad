"""How well the heatmaps of a table's finished runs find the object, by method; and the set of small objects for it."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from camcal.training.checkpoints import load_network
from camcal.training.data.sources import preprocessing_of
from camcal.training.experiments.results import spread
from camcal.training.experiments.sweep import Job
from camcal.training.run import RunFolder
from tests.benchmarks.heatmaps import localisation, maps
from tests.benchmarks.heatmaps.boxes import is_usable, load_boxes

SMALL = 0.3  # of the picture, at most
LEAST = 4  # training images of a class; with fewer none could be held out

COLUMNS = ("mean", "pointing", "energy", "max_box_acc_v2", "pxap", "mean_many", "mean_medium", "mean_few")


def list_small_objects(root: Path, out: Path) -> tuple[int, int, int]:
    """Write a split file of the photographs whose object is small; returns the numbers of classes, train and test.

    Args:
        root: a folder with `boxes.csv` (path, split, label, xmin, ymin, xmax, ymax), of images of 64×64 pixels.
        out: the file, with the columns path, split and label, which are the names of the classes' folders.
    """
    rows = []
    with (root / "boxes.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            left, top, right, bottom = (int(row[edge]) for edge in ("xmin", "ymin", "xmax", "ymax"))
            area = (right - left + 1) * (bottom - top + 1) / 64**2
            if is_usable((left, top, right, bottom), 64, 64) and area < SMALL:
                part = "train" if row["split"] == "train" else "test"
                rows.append((row["path"], part, Path(row["path"]).parent.name))
    trained = [label for _, part, label in rows if part == "train"]
    tested = {label for _, part, label in rows if part == "test"}
    kept = {label for label in tested if trained.count(label) >= LEAST}
    rows = [row for row in rows if row[2] in kept]
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "split", "label"), *rows])
    train = sum(part == "train" for _, part, _ in rows)
    return len(kept), train, len(rows) - train


def measure(folder: RunFolder, boxes: Path, per_group: int, seed: int) -> dict[str, float]:
    """The four measures of a run's calibrated maps of its calibrated predictions, their mean, and that of each group.

    The photographs are those of the run's test part that have a usable box.
    """
    network, recipe, meta = load_network(folder.network)
    rule = preprocessing_of(recipe.data)
    tested = None
    if recipe.data.split_file is not None:
        with (boxes / recipe.data.split_file).open(newline="", encoding="utf-8") as file:
            tested = {row["path"] for row in csv.DictReader(file) if row["split"] == "test"}
    data = load_boxes(boxes, meta["classes"], meta["train_counts"], rule, per_group, seed, tested)
    answers = maps.answer(network, data.images)
    chosen = answers.calibrated_logits.argmax(axis=1)
    own_Nhw = answers.calibrated_maps[np.arange(len(chosen)), chosen]
    scaled = maps.scaled(own_Nhw, rule.input_size, network.shift)
    statistics = localisation.statistics(scaled, data.boxes)
    found = localisation.measures(statistics, np.arange(len(chosen)))
    groups = {name: localisation.measures(statistics, index)["mean"] for name, index in data.positions().items()}
    return found | {f"mean_{name}": value for name, value in groups.items()}


def table(jobs: list[Job], out: Path, boxes: Path, per_group: int, seed: int) -> str:
    """A Markdown table of the finished jobs on photographs with boxes, by data set and method.

    What was measured is kept in `boxes.json` in `out`, the folder of `camcal bench-table`.
    """
    kept = out / "boxes.json"
    measured: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    by_method: dict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in jobs:
        if job.recipe.data.root is None or job.recipe.data.root.resolve() != boxes.resolve():
            continue
        if not (out / f"{job.name}.json").is_file():
            continue
        by_method[job.recipe.name, job.row.method].append(job)
        if job.name not in measured:
            measured[job.name] = measure(RunFolder(out / "runs" / job.training), boxes, per_group, seed)
            kept.write_text(json.dumps(measured, indent=1) + "\n")
    lines = [f"| data | method | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for (name, method), of_method in by_method.items():
        cells = [spread([measured[job.name].get(column) for job in of_method]) for column in COLUMNS]
        lines.append(f"| {name} | {method} | {len(of_method)} | {' | '.join(cells)} |")
    return "\n".join(lines)
