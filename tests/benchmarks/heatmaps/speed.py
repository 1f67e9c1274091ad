"""Milliseconds for the maps of one image, the network's forward pass included; all contenders take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from camcal.models import cam
from camcal.models.bundle import Bundle
from camcal.models.classifier import LongTailClassifier
from camcal.service.engine.session import Session
from tests.benchmarks.heatmaps.comparison import Draw
from tests.benchmarks.heatmaps.maps import enlarge

Contender = Callable[[NDArray[np.uint8], int], object]
"""Takes one image, 1×S×S×3, and makes maps of it in its pixels, one for each of as many classes as are asked for."""

OURS = "camcal"
TURNS = 5


def served(bundle: Path) -> Contender:
    """camcal as it serves, and the maps of the best classes enlarged."""
    loaded = Bundle.load(bundle)
    session = Session(loaded, device="cpu", threads=torch.get_num_threads(), max_batch=1)

    def run(images: NDArray[np.uint8], classes: int) -> object:
        return enlarge(session.run(images, classes).maps[0], images.shape[1], loaded.manifest.shift)

    return run


def forward(network: LongTailClassifier) -> Contender:
    """The network alone, in PyTorch: what every method needs at least."""

    def run(images: NDArray[np.uint8], classes: int) -> object:
        with torch.inference_mode():
            return network(torch.from_numpy(images))

    return run


def in_torch(network: LongTailClassifier) -> Contender:
    """camcal's maps of the best classes in PyTorch, as the peers compute theirs."""

    def run(images: NDArray[np.uint8], classes: int) -> object:
        with torch.inference_mode():
            logits_BK, features_BChw = network.explain(torch.from_numpy(images))
            best = network.calibrate(logits_BK)[0].topk(classes).indices
            weight_KC, bias_K = network.rows()
            maps = cam.contributions(features_BChw, weight_KC[best][None], bias_K[best][None])
        return enlarge(maps[0].numpy(), images.shape[1], network.shift)

    return run


def peer(draw: Draw) -> Contender:
    """Another method; which classes it explains does not change how long it takes."""
    return lambda images, classes: draw(np.repeat(images, classes, axis=0), np.arange(classes))


def measure(
    contenders: Mapping[str, Contender], images: NDArray[np.uint8], rounds: int, classes: int = 1
) -> dict[str, dict[str, Any]]:
    """The median time of each contender for the maps of so many classes, and the median of its ratio to ours.

    Every contender gets the same image in a round, in an order of its own, and gets it `TURNS` times in a row. The last
    counts: the threads of the one before wait awake for a few milliseconds, and would be counted with the next.
    """
    random = np.random.default_rng(0)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        image = images[number % len(images)][None]
        for place in random.permutation(len(names)):
            name = names[place]
            for _ in range(TURNS):
                began = time.perf_counter()
                contenders[name](image, classes)
            times[name].append(1000 * (time.perf_counter() - began))
    return {
        name: {
            "ms": round(statistics.median(values), 3),
            "ratio": round(statistics.median(b / a for a, b in zip(times[OURS], values, strict=True)), 2),
        }
        for name, values in times.items()
    }
