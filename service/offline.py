"""Predicts files without a server: the same decoding, batches and ranking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.cpus import usable_cpus
from service.decoding import Decoded, ImageTooLargeError, Limits, UndecodableImageError, UnsupportedFormatError, decode
from service.explanation import marc_map, offsets
from service.heatmap import render
from service.prediction import Prior, Ranker
from service.session import Outputs, Session

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAM_SIZE = 512  # px


@dataclass(frozen=True, kw_only=True)
class FilePrediction:
    """One file's answer: `rows` as in the service's `predictions`, or `error`, a sentence that says why not."""

    path: Path
    rows: list[dict[str, Any]]
    heatmap: bytes | None = None  # PNG: the calibrated map of the best class, on the picture
    error: str | None = None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`, with folders searched to the bottom, in order.

    Raises:
        ValueError: if a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise ValueError(f"the folder {path} holds no image ({', '.join(SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    return found


def predict_files(
    session: Session, files: Sequence[Path], *, top_k: int, prior: Prior, limits: Limits, heatmaps: bool = False
) -> Iterator[FilePrediction]:
    """Predict `files` in batches; answers come in order, and a bad file fails alone."""
    ranker = Ranker(session.bundle.manifest)
    preprocessing = session.bundle.manifest.preprocessing

    def read(path: Path) -> Decoded | str:
        try:
            return decode(path.read_bytes(), preprocessing, limits, picture=heatmaps)
        except (OSError, UnsupportedFormatError, UndecodableImageError, ImageTooLargeError) as error:
            return error.strerror or "it cannot be read" if isinstance(error, OSError) else str(error)

    with ThreadPoolExecutor(usable_cpus()) as threads:
        for start in range(0, len(files), session.max_batch):
            batch = files[start : start + session.max_batch]
            decoded = list(threads.map(read, batch))
            answer = _run(session, ranker, [d for d in decoded if isinstance(d, Decoded)], top_k, prior, heatmaps)
            for path, item in zip(batch, decoded, strict=True):
                if isinstance(item, str):
                    yield FilePrediction(path=path, rows=[], error=item)
                else:
                    rows, heatmap = next(answer)
                    yield FilePrediction(path=path, rows=rows, heatmap=heatmap)


def _run(
    session: Session, ranker: Ranker, decoded: list[Decoded], top_k: int, prior: Prior, heatmaps: bool
) -> Iterator[tuple[list[dict[str, Any]], bytes | None]]:
    """Rows and heatmap of each of a batch's pictures; nothing is run unless one is asked for."""
    pixels = np.stack([item.pixels for item in decoded])
    outputs = session.run(pixels, ranker.maps_needed(top_k, prior, heatmaps))
    for row, item in enumerate(decoded):
        ranking = ranker.rank(outputs, row, top_k, prior)
        heatmap = _draw(ranker, outputs, row, ranking.classes[0], item) if heatmaps else None
        yield ranker.rows(ranking), heatmap


def _draw(ranker: Ranker, outputs: Outputs, row: int, best: int, item: Decoded) -> bytes:
    calibration = ranker.manifest.calibration
    plain = ranker.maps(outputs, row, [best])[0]
    return render(
        marc_map(plain, calibration.omega[best], offsets(calibration, [best])[0]),
        item.picture,
        item.picture_size,
        size=CAM_SIZE,
        colormap="turbo",
        alpha=0.6,
        on_picture=True,
        format="png",
    )
