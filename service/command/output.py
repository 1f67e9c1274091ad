"""Writes predictions of files: a table for people, CSV or JSON lines for programs, heatmaps as PNG."""

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
    """What writes one file's answer: to a table on standard output, or to the .csv or .jsonl file `out`.

    Raises:
        ValueError: if `out` has another ending.
    """
    if out is None:
        with _table() as write:
            yield write
        return
    writers = {".csv": _csv, ".jsonl": _jsonl}
    if out.suffix not in writers:
        raise ValueError(f"--out is {out}; expected a file that ends in .csv or .jsonl")
    with out.open("w", newline="", encoding="utf-8") as file:
        yield writers[out.suffix](file)


def _csv(file: IO[str]) -> Write:
    writer = csv.writer(file)
    writer.writerow(("file", "rank", *COLUMNS))

    def write(answer: FilePrediction) -> None:
        for rank, row in enumerate(answer.rows, 1):
            writer.writerow((answer.path, rank, *(row[column] for column in COLUMNS)))

    return write


def _jsonl(file: IO[str]) -> Write:
    def write(answer: FilePrediction) -> None:
        file.write(json.dumps({"file": str(answer.path), "predictions": answer.rows}, ensure_ascii=False) + "\n")

    return write


@contextmanager
def _table() -> Iterator[Write]:
    table = Table(box=None, pad_edge=False)
    for heading in ("file", "class", "group", "trained on"):
        table.add_column(heading, overflow="fold")
    for heading in ("probability", "calibrated"):
        table.add_column(heading, justify="right")

    def write(answer: FilePrediction) -> None:
        for rank, row in enumerate(answer.rows):
            shares = (f"{row[name]:.1%}" for name in ("probability", "calibrated_probability"))
            name = printable(str(answer.path)) if rank == 0 else ""
            table.add_row(name, printable(row["label"]), row["group"], str(row["train_count"]), *shares)

    yield write
    if table.row_count:
        # Folded to a person's window, but never inside a pipe.
        Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 10_000).print(table)


class CamWriter:
    """Writes heatmaps, never over an image: to the file `path` if one image was named, else into the folder `path`.

    Args:
        path: where to.
        images: what is predicted.
        single: whether `images` is one file that was named, rather than found in a folder.

    Raises:
        ValueError: if `path` is neither, or the image itself.
    """

    def __init__(self, path: Path, images: Sequence[Path], *, single: bool):
        self._path = path
        self._single = single and not path.is_dir()
        self._images = {image.resolve() for image in images}
        if self._single:
            if path.suffix.lower() != ".png":
                raise ValueError(f"--cam is {path}; expected a file that ends in .png, or an existing folder")
            if path.resolve() in self._images:
                raise ValueError(f"--cam is {path}, the image itself; expected another file")
        elif path.suffix.lower() == ".png" and not path.is_dir():
            raise ValueError(f"--cam is {path}; expected a folder, since there may be several images")
        else:
            path.mkdir(parents=True, exist_ok=True)
        self._taken: set[str] = set()

    def write(self, image: Path, heatmap: bytes) -> None:
        """Write the heatmap of `image`. In a folder, images of the same name are numbered."""
        target = self._path if self._single else self._path / self._free(image.name)
        target.write_bytes(heatmap)

    def _free(self, name: str) -> str:
        number, free = 1, f"{name}.png"
        while free in self._taken or (self._path / free).resolve() in self._images:
            number += 1
            free = f"{name}-{number}.png"
        self._taken.add(free)
        return free
