"""Does a map find its class among four? The grid pointing game of Böhle et al. (arXiv 2104.00032).

Four photographs of four classes make one picture, and each class is asked for in turn: a map of one class should lie on
the photograph of that class. A map that shows objects of any class, or the middle, gets a quarter.

N images, M mosaics, S side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camcal.models.bundle import GROUPS
from camcal.models.classifier import LongTailClassifier
from camcal.training.metrics import softmax
from tests.benchmarks.heatmaps import localisation, maps
from tests.benchmarks.heatmaps.boxes import BoxedImages
from tests.benchmarks.heatmaps.comparison import ALONG, CENTRE, HALF, OURS, PLAIN, VERSIONS, Draw
from tests.benchmarks.heatmaps.localisation import Floats, Ints, Maps

PHOTOGRAPHS = 4
CONFIDENT = 240  # photographs to draw from, at most


def choose(found: maps.Answers, labels_N: Ints, count: int, seed: int) -> Ints:
    """The photographs of each mosaic, M×4, of four classes.

    They are drawn at random from those whose calibrated prediction is right, the `CONFIDENT` surest of them: a network
    that does not see the class cannot show where it is.

    Raises:
        ValueError: if those are of fewer than four classes.
    """
    right = np.flatnonzero(found.calibrated_logits.argmax(axis=1) == labels_N)
    sureness = softmax(found.calibrated_logits[right]).max(axis=1)
    right = right[np.argsort(-sureness, kind="stable")[:CONFIDENT]]
    by_class = [right[labels_N[right] == label] for label in np.unique(labels_N[right])]
    if len(by_class) < PHOTOGRAPHS:
        raise ValueError(f"only {len(by_class)} classes are recognised; a mosaic needs {PHOTOGRAPHS}")
    random = np.random.default_rng(seed)
    shares = np.array([len(index) for index in by_class]) / len(right)
    rows = []
    for _ in range(count):
        classes = random.choice(len(by_class), PHOTOGRAPHS, replace=False, p=shares)
        rows.append([random.choice(by_class[place]) for place in classes])
    return np.array(rows, dtype=np.int64)


def compose(images: NDArray[np.uint8], chosen_M4: Ints) -> NDArray[np.uint8]:
    """Pictures M×2S×2S×3 of images N×S×S×3, two above two."""
    four = images[chosen_M4]
    above, below = (np.concatenate([four[:, place], four[:, place + 1]], axis=2) for place in (0, 2))
    return np.concatenate([above, below], axis=1)


def shares(maps_MSS: Maps, place: int) -> Floats:
    """How much of each map's positive sum lies on the photograph at `place`, M values; 0 for a map without any."""
    side = maps_MSS.shape[1] // 2
    row, column = divmod(place, 2)
    inside = np.zeros(maps_MSS.shape, dtype=np.bool_)
    inside[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = True
    return localisation.energy(maps_MSS.clip(min=0), inside)


def compare(
    network: LongTailClassifier, data: BoxedImages, peers: Mapping[str, Draw], count: int, seed: int
) -> dict[str, Any]:
    """The mean share of each method, over all asked classes and those of each group, and how many were asked for."""
    chosen_M4 = choose(maps.answer(network, data.images), data.labels, count, seed)
    pictures, labels_M4 = compose(data.images, chosen_M4), data.labels[chosen_M4]
    found = maps.answer(network, pictures)
    every, side, shift = np.arange(count), pictures.shape[1], network.shift
    values: dict[str, dict[str, list[Floats]]] = {version: {} for version in VERSIONS}
    for place in range(PHOTOGRAPHS):
        asked = labels_M4[:, place]
        contributions = {
            OURS: found.calibrated_maps[every, asked],
            PLAIN: found.maps[every, asked],
            HALF: maps.leaning(network, pictures, asked, 0.5),
            ALONG: maps.leaning(network, pictures, asked, 0.0),
        }
        drawn = {
            name: (maps.enlarge(result, side, shift), maps.drawn(result, side, shift))
            for name, result in contributions.items()
        }
        given = {CENTRE: localisation.centre(count, side)} | {
            name: draw(pictures, asked) for name, draw in peers.items()
        }
        drawn |= {name: (result, localisation.cut(result)) for name, result in given.items()}
        for name, results in drawn.items():
            for version, result in zip(VERSIONS, results, strict=True):
                values[version].setdefault(name, []).append(shares(result, place))
    groups = np.array(data.groups)[chosen_M4].T.ravel()
    index = {"all": np.arange(len(groups))} | {name: np.flatnonzero(groups == name) for name in GROUPS}
    index = {name: positions for name, positions in index.items() if len(positions)}
    return {
        "mosaics": count,
        "asked": {name: len(positions) for name, positions in index.items()},
        "shares": {
            version: {
                name: {group: float(np.concatenate(parts)[positions].mean()) for group, positions in index.items()}
                for name, parts in of_method.items()
            }
            for version, of_method in values.items()
        },
    }
