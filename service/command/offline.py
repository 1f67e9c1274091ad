"""Prediction of files without a server, with the same decoding, batching and ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camcal.cpus import usable_cpus
from camcal.models.bundle import Prior
from camcal.service.engine.decoding import (
    Decoded,
    ImageTooLargeError,
    Limits,
    UndecodableImageError,
    UnsupportedFormatError,
    decode,
)
from camcal.service.engine.ranking import Ranker, explain
from camcal.service.engine.session import Session
from camcal.service.heatmaps.explanation import Explanation
from camcal.service.heatmaps.heatmap import View, render

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAM_SIZE = 512  # px

Draw = Callable[[Explanation, Sequence[dict[str, Any]], str], bytes]


@dataclass(frozen=True, kw_only=True)
class FilePrediction:
    """The result for one file: `rows` as in the `predictions` of a response, or `error`, a sentence."""

    path: Path
    rows: list[dict[str, Any]]
    heatmap: bytes | None = None  # PNG
    error: str | None = None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths` in order; folders are searched recursively.

    Raises:
        ValueError: if a path does not exist or a folder contains no images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not images:
                raise ValueError(f"the folder {path} contains no images ({', '.join(SUFFIXES)})")
            files += images
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    return files


def predict_files(
    session: Session, files: Sequence[Path], *, top_k: int, prior: Prior, limits: Limits, draw: Draw | None = None
) -> Iterator[FilePrediction]:
    """Predict `files` in batches. Results come in order, and a bad file fails alone.

    Args:
        session: the model.
        files: image files.
        top_k, prior: as in `POST /predict`.
        limits: limits for each file.
        draw: draws the heatmap, `draw_top` or `sheet`; None for no heatmaps.
    """
    ranker = Ranker(session.bundle.manifest)
    preprocessing = session.bundle.manifest.preprocessing

    def read(path: Path) -> Decoded | str:
        try:
            return decode(path.read_bytes(), preprocessing, limits, picture=draw is not None)
        except (OSError, UnsupportedFormatError, UndecodableImageError, ImageTooLargeError) as error:
            return error.strerror or "cannot read the file" if isinstance(error, OSError) else str(error)

    with ThreadPoolExecutor(usable_cpus()) as threads:
        for start in range(0, len(files), session.max_batch):
            batch = files[start : start + session.max_batch]
            decoded = list(threads.map(read, batch))
            images = [(path, item) for path, item in zip(batch, decoded, strict=True) if isinstance(item, Decoded)]
            predictions = _run(session, ranker, images, top_k, prior, draw)
            for path, item in zip(batch, decoded, strict=True):
                yield FilePrediction(path=path, rows=[], error=item) if isinstance(item, str) else next(predictions)


def _run(
    session: Session, ranker: Ranker, images: list[tuple[Path, Decoded]], top_k: int, prior: Prior, draw: Draw | None
) -> Iterator[FilePrediction]:
    """Predict one batch, lazily: the model runs when the first result is requested."""
    shown = max(top_k, 2)  # `sheet` also shows the runner-up
    pixels = np.stack([item.pixels for _, item in images])
    outputs = session.run(pixels, ranker.maps_needed(shown, prior, draw is not None))
    faults = outputs.faults()
    for row, (path, item) in enumerate(images):
        if row in faults:
            yield FilePrediction(path=path, rows=[], error=f"the model failed: {faults[row]}")
            continue
        ranking = ranker.rank(outputs, row, shown, prior)
        rows = ranker.rows(ranking)
        heatmap = None
        if draw:
            explanation = explain(ranker, outputs, row, ranking, ranking.classes[:2], item, expires_at=0)
            heatmap = draw(explanation, rows, path.name)
        yield FilePrediction(path=path, rows=rows[:top_k], heatmap=heatmap)


def draw_top(explanation: Explanation, rows: Sequence[dict[str, Any]], name: str) -> bytes:
    """The calibrated heatmap of the top class, over the image."""
    scale = explanation.scale(0, True, None, signed=False, common=False)
    view = View(size=CAM_SIZE, window=explanation.window)
    return render(explanation.contributions(0, True), scale, explanation.picture, explanation.picture_size, view)
