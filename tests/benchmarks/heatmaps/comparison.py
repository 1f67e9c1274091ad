"""One network's maps by every method for the same images: how well they find the object and bear on the prediction.

N images, P pairs of an image and a class, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from camcal.models.classifier import LongTailClassifier
from tests.benchmarks.heatmaps import faithfulness, localisation, maps
from tests.benchmarks.heatmaps.boxes import BoxedImages
from tests.benchmarks.heatmaps.localisation import Ints, Maps, Statistics

RULES = ("true", "raw", "calibrated")
"""Which class is explained: the label, the plain prediction or the calibrated one."""

VERSIONS = ("given", "cut")
"""Maps as a method gives them, and cut off at their median, as camcal's are in a picture."""

OURS, PLAIN, CENTRE = "calibrated", "plain", "centre"
UNMOVED = "unmoved"  # without `map_shift`
HALF, ALONG = "half", "along"  # `maps.leaning` by a half and by nothing
WITH, OFF = "with_camc", "camc_off"  # of the other network: its maps, and those with the module switched off
CORRECT = "correct"  # the images whose calibrated prediction is right
Draw = Callable[[NDArray[np.uint8], Ints], Maps]
"""A peer: from P images and the class to explain of each to P maps in [0, 1]."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found on N images.

    classes: N under each rule.
    statistics: in each version, under each rule, of each method.
    probes: the images whose maps are kept.
    kept: in each version, each method's maps of these for the calibrated prediction.
    order_changed: the largest difference between the plain and the calibrated map of one class, both in [0, 1].
    """

    data: BoxedImages
    classes: dict[str, Ints]
    statistics: dict[str, dict[str, dict[str, Statistics]]]
    probes: Ints
    kept: dict[str, dict[str, Maps]]
    order_changed: float


def compare(
    network: LongTailClassifier,
    with_camc: LongTailClassifier | None,
    data: BoxedImages,
    peers: Mapping[str, Draw],
    probes: Ints,
    say: Say,
) -> Comparison:
    """Draw and score all maps.

    Args:
        with_camc: a network of the same recipe with CAMC, explained by its own predictions; None for none.
        peers: what else to draw, by name.
        probes: the images whose maps to keep.
    """
    on = maps.answer(network, data.images)
    classes = on.classes(data.labels)
    statistics: dict[str, dict[str, dict[str, Statistics]]] = {v: {rule: {} for rule in RULES} for v in VERSIONS}
    kept: dict[str, dict[str, Maps]] = {version: {} for version in VERSIONS}
    ours: dict[str, Maps] = {}
    changed = 0.0
    for name, rule, *results in _all_maps(network, on, with_camc, data, peers, classes):
        say(f"scoring {name}, {rule} class")
        for version, result in zip(VERSIONS, results, strict=True):
            statistics[version][rule][name] = localisation.statistics(result, data.boxes)
            if rule == "calibrated" and name not in (UNMOVED, WITH, OFF):
                kept[version][name] = result[probes]
        if name == OURS:
            ours[rule] = results[0]
        elif name == PLAIN:
            changed = max(changed, float(np.abs(results[0] - ours.pop(rule)).max()))
    return Comparison(
        data=data, classes=classes, statistics=statistics, probes=probes, kept=kept, order_changed=changed
    )


def _all_maps(
    network: LongTailClassifier,
    on: maps.Answers,
    with_camc: LongTailClassifier | None,
    data: BoxedImages,
    peers: Mapping[str, Draw],
    classes: Mapping[str, Ints],
) -> Iterator[tuple[str, str, Maps, Maps]]:
    """The maps of each method under each rule, as (method, rule, N×S×S in each of `VERSIONS`)."""
    side, every = data.images.shape[1], np.arange(len(data.labels))

    def both(contributions_Nhw: Maps, shift: maps.Shift = network.shift) -> tuple[Maps, Maps]:
        return maps.scaled(contributions_Nhw, side, shift), maps.drawn(contributions_Nhw, side, shift)

    for rule, chosen in classes.items():
        yield OURS, rule, *both(on.calibrated_maps[every, chosen])
        yield PLAIN, rule, *both(on.maps[every, chosen])
        yield UNMOVED, rule, *both(on.calibrated_maps[every, chosen], maps.UNMOVED)
        for name, lean in ((HALF, 0.5), (ALONG, 0.0)):
            yield name, rule, *both(maps.leaning(network, data.images, chosen, lean))
        spot = localisation.centre(len(every), side)
        yield CENTRE, rule, spot, localisation.cut(spot)
    if with_camc is not None:
        shift = with_camc.shift
        other = maps.answer(with_camc, data.images)
        off = maps.answer(maps.without_camc(with_camc), data.images)
        for rule, chosen in other.classes(data.labels).items():
            yield WITH, rule, *both(other.calibrated_maps[every, chosen], shift)
            yield OFF, rule, *both(off.calibrated_maps[every, chosen], shift)
    for name, draw in peers.items():
        for rule, result in draw_each(draw, data.images, classes).items():
            yield name, rule, result, localisation.cut(result)


def draw_each(draw: Draw, images: NDArray[np.uint8], classes: Mapping[str, Ints]) -> dict[str, Maps]:
    """A peer's maps under each rule; a class that several rules choose for an image is drawn once."""
    pairs = np.concatenate([np.stack([np.arange(len(images)), chosen], axis=1) for chosen in classes.values()])
    unique, place = np.unique(pairs, axis=0, return_inverse=True)
    result = draw(images[unique[:, 0]], unique[:, 1])
    places = place.reshape(len(classes), len(images))
    return {rule: result[of_image] for rule, of_image in zip(classes, places, strict=True)}


def accuracy(found: Comparison) -> dict[str, dict[str, float]]:
    """The share of images whose plain, and whose calibrated, prediction is right."""
    return {
        rule: {
            group: float((found.classes[rule] == found.data.labels)[index].mean())
            for group, index in found.data.positions().items()
        }
        for rule in ("raw", "calibrated")
    }


def localise(found: Comparison) -> dict[str, Any]:
    """The measures by version, rule and method, over all images, those of each group and the correct ones."""
    positions = found.data.positions()
    correct = np.flatnonzero(found.classes["calibrated"] == found.data.labels)
    if len(correct):
        positions[CORRECT] = correct
    return {
        version: {
            rule: {
                name: {group: localisation.measures(statistics, index) for group, index in positions.items()}
                for name, statistics in of_method.items()
            }
            for rule, of_method in of_rule.items()
        }
        for version, of_rule in found.statistics.items()
    }


def leads(found: Comparison) -> dict[str, Any]:
    """How far the mean of our calibrated maps is ahead of others in the same version, with its interval.

    Ours explain the calibrated prediction, and the network with CAMC, on or off, its own; the others explain what is
    predicted without calibration.
    """
    result: dict[str, Any] = {}
    for version, of_rule in found.statistics.items():
        others = {name: s for name, s in of_rule["raw"].items() if name not in (OURS, UNMOVED, HALF, ALONG)}
        others |= {name: s for name, s in of_rule["calibrated"].items() if name in (WITH, OFF)}
        result[version] = {
            name: {
                group: localisation.lead(of_rule["calibrated"][OURS], theirs, index)
                for group, index in found.data.positions().items()
            }
            for name, theirs in others.items()
        }
    return result


def bear(network: LongTailClassifier, found: Comparison, say: Say) -> dict[str, Any]:
    """ROAD, insertion and deletion of maps of the calibrated prediction: in each version, by method and by group."""
    groups = np.array(found.data.groups)[found.probes]
    chosen = {"all": np.arange(len(groups))} | {str(name): np.flatnonzero(groups == name) for name in np.unique(groups)}
    labels = found.classes["calibrated"][found.probes]
    images = found.data.images[found.probes]
    result: dict[str, Any] = {}
    for version, of_method in found.kept.items():
        result[version] = {}
        for name, drawn in of_method.items():
            say(f"perturbing by {name}, {version}")
            values = [bears(network, *probe) for probe in zip(images, drawn, labels.tolist(), strict=True)]
            result[version][name] = {
                group: {key: float(np.mean([values[i][key] for i in index])) for key in values[0]}
                for group, index in chosen.items()
            }
    return result


def bears(
    network: LongTailClassifier, image: NDArray[np.uint8], map_SS: NDArray[np.float32], label: int
) -> dict[str, float]:
    """ROAD, insertion and deletion of one map, by the calibrated probability of the class."""

    @torch.no_grad()
    def judge(images: NDArray[np.float32]) -> NDArray[np.float64]:
        calibrated_BK = network.calibrate(network(torch.from_numpy(images))) / network.temperature
        probabilities: NDArray[np.float64] = calibrated_BK.double().softmax(dim=1)[:, label].numpy()
        return probabilities

    random = np.random.default_rng(0)
    order = faithfulness.by_relevance(map_SS, random)
    pixels = image.astype(np.float32)
    return {
        "road": faithfulness.road(pixels, order, judge, random),
        "insertion": faithfulness.insertion(pixels, order, judge),
        "deletion": faithfulness.deletion(pixels, order, judge, network.mean.flatten().double().numpy()),
    }
