"""Milliseconds for one image and one map, the network's forward pass included; all contenders take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models import cam
from models.bundle import Bundle
from models.classifier import LongTailClassifier
from service.session import Session
from tests.benchmarks.heatmaps.comparison import Draw
from tests.benchmarks.heatmaps.maps import enlarge

Contender = Callable[[NDArray[np.uint8]], object]
"""Takes one image, 1×S×S×3, and makes one map of it in its pixels."""

OURS = "camcal"


def served(bundle: Path) -> Contender:
    """camcal as it serves, and the map of the best class enlarged."""
    session = Session(Bundle.load(bundle), device="cpu", threads=torch.get_num_threads(), max_batch=1)

    def run(images: NDArray[np.uint8]) -> object:
        return enlarge(session.run(images, 1).maps[0], images.shape[1])

    return run


def forward(network: LongTailClassifier) -> Contender:
    """The network alone, in PyTorch: what every method needs at least."""

    def run(images: NDArray[np.uint8]) -> object:
        with torch.inference_mode():
            return network(torch.from_numpy(images))

    return run


def in_torch(network: LongTailClassifier) -> Contender:
    """camcal's map of the best class in PyTorch, as the peers compute theirs."""

    def run(images: NDArray[np.uint8]) -> object:
        with torch.inference_mode():
            logits_BK, features_BChw = network.explain(torch.from_numpy(images))
            best = network.calibrate(logits_BK).argmax(dim=1)
            weight_KC, bias_K = network.rows()
            maps = cam.contributions(features_BChw, weight_KC[best][None], bias_K[best][None])
        return enlarge(maps[0].numpy(), images.shape[1])

    return run


def peer(draw: Draw) -> Contender:
    """Another method; which class it explains does not change how long it takes."""
    return lambda images: draw(images, np.zeros(len(images), dtype=np.int64))


def measure(contenders: Mapping[str, Contender], images: NDArray[np.uint8], rounds: int) -> dict[str, dict[str, Any]]:
    """The median time of each contender, and the median over the rounds of its ratio to ours.

    Every contender gets the same image in a round, in an order of its own; a first round, which is not counted, warms
    them up.
    """
    random = np.random.default_rng(0)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        image = images[number % len(images)][None]
        for place in random.permutation(len(names)):
            name = names[place]
            began = time.perf_counter()
            contenders[name](image)
            times[name].append(1000 * (time.perf_counter() - began))
    ours = times[OURS][1:]
    return {
        name: {
            "ms": round(statistics.median(values[1:]), 3),
            "ratio": round(statistics.median(b / a for a, b in zip(ours, values[1:], strict=True)), 2),
        }
        for name, values in times.items()
    }
