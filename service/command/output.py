"""Output of `camcal predict`: a table, CSV, JSON lines, and heatmaps as PNG."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from camcal.printable import printable
from camcal.service.command.offline import FilePrediction

COLUMNS = (
    "class_id",
    "label",
    "group",
    "train_count",
    "logit",
    "probability",
    "calibrated_logit",
    "calibrated_probability",
)

Write = Callable[[FilePrediction], None]


@contextmanager
def open_writer(out: Path | None) -> Iterator[Write]:
    """A function that writes one prediction, to a table on standard output or to the .csv or .jsonl file `out`.

    Raises:
        ValueError: if `out` has another suffix.
    """
    if out is None:
        with _table() as write:
            yield write
        return
    writers = {".csv": _csv, ".jsonl": _jsonl}
    if out.suffix not in writers:
        raise ValueError(f"--out is {out}; expected a .csv or .jsonl file")
    with out.open("w", newline="", encoding="utf-8") as file:
        yield writers[out.suffix](file)


def _csv(file: IO[str]) -> Write:
    writer = csv.writer(file)
    writer.writerow(("file", "rank", *COLUMNS))

    def write(prediction: FilePrediction) -> None:
        for rank, row in enumerate(prediction.rows, 1):
            writer.writerow((prediction.path, rank, *(row[column] for column in COLUMNS)))

    return write


def _jsonl(file: IO[str]) -> Write:
    def write(prediction: FilePrediction) -> None:
        line = {"file": str(prediction.path), "predictions": prediction.rows}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")

    return write


@contextmanager
def _table() -> Iterator[Write]:
    table = Table(box=None, pad_edge=False)
    for heading in ("file", "class", "group", "train count"):
        table.add_column(heading, overflow="fold")
    for heading in ("probability", "calibrated"):
        table.add_column(heading, justify="right")

    def write(prediction: FilePrediction) -> None:
        for rank, row in enumerate(prediction.rows):
            probabilities = (f"{row[name]:.1%}" for name in ("probability", "calibrated_probability"))
            name = printable(str(prediction.path)) if rank == 0 else ""
            table.add_row(name, printable(row["label"]), row["group"], str(row["train_count"]), *probabilities)

    yield write
    if table.row_count:
        # Fold long lines to the width of a terminal, but not in a pipe.
        Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 10_000).print(table)


class CamWriter:
    """Writes heatmaps: one to the file `path`, or several into the folder `path`. Never overwrites an input image.

    Args:
        path: the file or folder to write to.
        images: the input images.
        single: whether the command line named a single image file, and no folder.

    Raises:
        ValueError: if `path` is of the wrong kind, or one of the input images.
    """

    def __init__(self, path: Path, images: Sequence[Path], *, single: bool):
        self._path = path
        self._single = single and not path.is_dir()
        self._images = {image.resolve() for image in images}
        if self._single:
            if path.suffix.lower() != ".png":
                raise ValueError(f"--cam is {path}; expected a .png file or an existing folder")
            if path.resolve() in self._images:
                raise ValueError(f"--cam is {path}, the input image; expected another file")
        elif path.suffix.lower() == ".png" and not path.is_dir():
            raise ValueError(f"--cam is {path}; expected a folder, because there may be several images")
        else:
            path.mkdir(parents=True, exist_ok=True)
        self._used: set[str] = set()

    def write(self, image: Path, heatmap: bytes) -> None:
        """Write the heatmap of `image`. In a folder, further images of the same name get a number."""
        target = self._path if self._single else self._path / self._unused(image.name)
        target.write_bytes(heatmap)

    def _unused(self, name: str) -> str:
        number, unused = 1, f"{name}.png"
        while unused in self._used or (self._path / unused).resolve() in self._images:
            number += 1
            unused = f"{name}-{number}.png"
        self._used.add(unused)
        return unused
