import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from camcal.models.classifier import LongTailClassifier
from camcal.models.preprocessing import Preprocessing
from camcal.training.checkpoints import load_network
from camcal.training.data import DataError, load_dataset
from camcal.training.experiments.sweep import load_table
from camcal.training.run import RunFolder
from tests.benchmarks.heatmaps import (
    comparison,
    faithfulness,
    forms,
    gallery,
    localisation,
    maps,
    mosaics,
    placement,
    report,
    speed,
)
from tests.benchmarks.heatmaps.__main__ import measure
from tests.benchmarks.heatmaps.boxes import BoxedImages, is_usable, load_boxes, scaled, unpack

RULE = Preprocessing(fit="stretch", resize=32, input_size=32, mean=(0, 0, 0), std=(1, 1, 1))
BOX = np.array([[2, 1, 5, 4]])  # columns 2, 3, 4 and rows 1, 2, 3


def peaked(row: int, column: int, side: int = 8) -> localisation.Maps:
    """One map, 1×S×S, with a single 1."""
    result = np.zeros((1, side, side), dtype=np.float32)
    result[0, row, column] = 1
    return result


def test_maps_fill_the_unit_range_and_constant_ones_become_zero() -> None:
    given = np.array([[[-2, 0], [2, 6]], [[3, 3], [3, 3]]], dtype=np.float32)
    assert localisation.unit_range(given).tolist() == [[[0, 0.25], [0.5, 1]], [[0, 0], [0, 0]]]


def test_pixels_inside_a_box() -> None:
    assert localisation.inside(np.array([[1, 0, 3, 2]]), 3).astype(int).tolist() == [[[0, 1, 1], [0, 1, 1], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("row", "column", "tolerance", "hit"),
    [
        (1, 2, 0, True),
        (3, 4, 0, True),
        (4, 4, 0, False),  # bottom and right are exclusive
        (4, 4, 1 / 8, True),
        (4, 5, 1 / 8, False),  # √2 pixels away
        (0, 2, 1 / 8, True),
    ],
)
def test_pointing_by_hand(row: int, column: int, tolerance: float, hit: bool) -> None:
    assert localisation.pointing(peaked(row, column), BOX, tolerance).tolist() == [hit]


def test_energy_is_the_share_inside() -> None:
    both = (3 * peaked(1, 2) + peaked(7, 7)).astype(np.float32)
    chosen = localisation.inside(np.repeat(BOX, 2, axis=0), 8)
    assert localisation.energy(np.concatenate([both, 0 * both]), chosen).tolist() == [0.75, 0]


def test_the_best_region_counts_at_each_threshold() -> None:
    given = np.zeros((8, 8), dtype=np.float32)
    given[1:4, 2:4] = 0.6  # 6 of the box's 9 pixels
    given[6:8, 6:8] = 1
    found = localisation.overlaps(given, BOX[0])
    assert found[0] == pytest.approx(6 / 9)
    assert found[localisation.THRESHOLDS > 0.61].max() == 0
    diagonal = (peaked(0, 0) + peaked(1, 1))[0]
    assert localisation.overlaps(diagonal, np.array([0, 0, 2, 2]))[0] == 1  # regions may touch at corners


def test_max_box_acc_v2_takes_a_threshold_for_each_overlap() -> None:
    # At 0.3 both images are right at the first threshold; at 0.5 one at either; at 0.7 one at the second.
    assert localisation.max_box_acc_v2(np.array([[0.3, 0.2], [0.6, 0.9]])) == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_pxap_is_the_average_precision_of_all_pixels() -> None:
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    given = (random.integers(0, 256, (5, 8, 8)) / 256).astype(np.float32)
    chosen = random.random((5, 8, 8)) < 0.3
    found = localisation.pxap(localisation.histograms(given, chosen), localisation.histograms(given, ~chosen))
    assert found == pytest.approx(average_precision_score(chosen.ravel(), given.ravel()))


def test_pxap_by_hand() -> None:
    # Down from the highest: in, out, in. Precision 1 at recall 1/2, 2/3 at recall 1.
    given = np.array([[[1.0, 0.5], [0.25, 0.0]]], dtype=np.float32)
    chosen = np.array([[[True, False], [True, False]]])
    found = localisation.pxap(localisation.histograms(given, chosen), localisation.histograms(given, ~chosen))
    assert found == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_a_map_that_is_the_box_is_perfect_and_ahead_of_the_centre() -> None:
    boxes = np.array([[0, 0, 6, 6], [8, 8, 16, 16], [0, 4, 10, 14]])
    perfect = localisation.statistics(localisation.inside(boxes, 16).astype(np.float32), boxes)
    centre = localisation.statistics(localisation.centre(3, 16), boxes)
    index = np.arange(3)
    assert localisation.measures(perfect, index) == dict.fromkeys((*localisation.MEASURES, "mean"), 1.0)
    ahead, low, high = localisation.lead(perfect, centre, index, resamples=50)
    assert 0 < low <= high < 1 and 0 < ahead < 1
    assert localisation.lead(centre, centre, index, resamples=5) == (0, 0, 0)


def test_the_centre_baseline_is_symmetric_and_highest_in_the_middle() -> None:
    (one,) = localisation.centre(1, 9)
    assert np.array_equal(one, one.T) and np.array_equal(one, one[::-1])
    assert one[4, 4] == 1 and one.argmax() == 40 and one[0, 0] == 0


def test_pixels_are_ordered_by_relevance() -> None:
    given = np.array([[0.5, 0.0], [1.0, 0.0]], dtype=np.float32)
    order = faithfulness.by_relevance(given, np.random.default_rng(0))
    assert order[:2].tolist() == [2, 0] and sorted(order[2:]) == [1, 3]


def brightness(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """A judge that wants the first pixel white."""
    return images[:, 0, 0, 0].astype(np.float64) / 255


def test_deletion_and_insertion_by_hand() -> None:
    image = np.full((2, 2, 3), 255, dtype=np.float32)
    black = np.zeros(3)
    first, last = np.array([0, 1, 2, 3]), np.array([3, 2, 1, 0])
    # Probabilities 1, 0, 0, 0, 0 and 1, 1, 1, 1, 0 at shares 0, ¼ … 1.
    assert faithfulness.deletion(image, first, brightness, black, steps=4) == pytest.approx(0.125)
    assert faithfulness.deletion(image, last, brightness, black, steps=4) == pytest.approx(0.875)
    assert faithfulness.insertion(image, first, brightness, steps=4) == pytest.approx(1)  # a blur leaves it white
    spot = np.zeros((56, 56, 3), dtype=np.float32)
    spot[0, 0] = 255
    order = np.arange(56 * 56)
    early = faithfulness.insertion(spot, order, brightness, steps=4)
    late = faithfulness.insertion(spot, order[::-1], brightness, steps=4)
    assert early > 0.875 > 0.5 > late


def test_imputation_solves_for_the_mean_of_the_neighbours() -> None:
    random = np.random.default_rng(0)
    image = random.uniform(0, 255, (6, 6, 3)).astype(np.float32)
    one = faithfulness.impute(image, np.array([14]), random, noise=0)  # row 2, column 2
    around = image[1:4, 1:4].astype(np.float64)
    straight = around[0, 1] + around[1, 0] + around[1, 2] + around[2, 1]
    diagonal = around[0, 0] + around[0, 2] + around[2, 0] + around[2, 2]
    assert one[2, 2] == pytest.approx(straight / 6 + diagonal / 12)
    changed = np.abs(one - image).sum(axis=2) > 0
    assert changed.sum() == 1

    removed = np.array([0, 1, 2, 7, 8, 20])  # a corner, an edge, and pixels that depend on one another
    several = faithfulness.impute(image, removed, random, noise=0).astype(np.float64)
    for pixel in removed:
        row, column = divmod(int(pixel), 6)
        near = [
            (weight, several[row + down, column + right])
            for (down, right), weight in faithfulness.NEIGHBOURS.items()
            if 0 <= row + down < 6 and 0 <= column + right < 6
        ]
        mean = sum(weight * value for weight, value in near) / sum(weight for weight, _ in near)
        assert several[row, column] == pytest.approx(mean, abs=1e-3)


def test_road_is_high_where_the_map_marks_what_counts() -> None:
    image = np.zeros((6, 6, 3), dtype=np.float32)
    image[0, 0] = 255
    order = np.arange(36)
    random = np.random.default_rng(0)
    good = faithfulness.road(image, order, brightness, random)
    assert good == pytest.approx(0.5, abs=0.02)  # (1 - 0)/2: filled from black neighbours
    assert faithfulness.road(image, order[::-1], brightness, random) == pytest.approx(-0.5, abs=0.02)


def test_usable_boxes() -> None:
    assert is_usable((0, 0, 30, 63), 64, 64)
    assert not is_usable((5, 5, 5, 20), 64, 64) and not is_usable((5, 9, 20, 9), 64, 64)
    assert not is_usable((0, 0, 63, 57), 64, 64)  # 58 of 64 rows
    assert is_usable((0, 0, 63, 56), 64, 64)  # 57 of 64 rows, 89 %


def test_boxes_move_with_the_picture() -> None:
    assert scaled((0, 16, 31, 63), 64, 64, RULE) == (0, 8, 16, 32)
    crop = Preprocessing(fit="crop", resize=32, input_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    assert scaled((0, 0, 63, 63), 128, 64, crop) == (0, 0, 8, 16)
    assert scaled((56, 24, 71, 39), 128, 64, crop) == (4, 4, 12, 12)
    boxed = RULE.model_copy(update={"fit": "letterbox"})
    assert scaled((0, 0, 127, 63), 128, 64, boxed) == (0, 8, 32, 24)
    assert scaled((64, 32, 127, 63), 128, 64, boxed) == (16, 16, 32, 24)


CLASSES = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two validation photographs of noise of each of ten classes; one has no usable box."""
    root = tmp_path_factory.mktemp("boxed") / "photographs"
    random = np.random.default_rng(0)
    with (root.parent / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "label", "xmin", "ymin", "xmax", "ymax"])
        writer.writerow(["train/zero/0.png", "train", 0, 0, 0, 9, 9])
        for label, name in enumerate(CLASSES):
            (root / "val" / name).mkdir(parents=True)
            for number in range(2):
                path = root / "val" / name / f"{number}.png"
                Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
                corner = 40 if (label, number) != (3, 1) else 10
                writer.writerow([path.relative_to(root), "val", label, 10, 10 + label, corner, 50])
    return (root.parent / "boxes.csv").rename(root / "boxes.csv").parent


def test_photographs_with_usable_boxes_are_drawn_from_each_group(boxed: Path) -> None:
    counts = [500, 400, 300, 200, 90, 80, 70, 60, 50, 5]
    everything = load_boxes(boxed, CLASSES, counts, RULE, 0, seed=0)
    assert everything.images.shape == (19, 32, 32, 3)
    assert everything.groups == ["many"] * 7 + ["medium"] * 10 + ["few"] * 2
    assert everything.boxes[0].tolist() == [5, 5, 20, 26]  # 10 to 41 and 10 to 51, halved
    assert {name: len(index) for name, index in everything.positions().items()} == {
        "all": 19,
        "many": 7,
        "medium": 10,
        "few": 2,
    }
    few = load_boxes(boxed, CLASSES, counts, RULE, 3, seed=0)
    assert few.groups == ["many"] * 3 + ["medium"] * 3 + ["few"] * 2
    assert np.array_equal(few.images, load_boxes(boxed, CLASSES, counts, RULE, 3, seed=0).images)
    with pytest.raises(DataError, match="a class that the network does not know"):
        load_boxes(boxed, CLASSES[:9], counts, RULE, 0, seed=0)


def test_only_the_images_of_a_split_are_drawn(boxed: Path) -> None:
    found = load_boxes(boxed, CLASSES[:1], [5], RULE, 0, 0, {"val/zero/1.png"})
    assert found.labels.tolist() == [0]


def test_small_objects_are_listed_where_a_class_has_enough_of_them(tmp_path: Path) -> None:
    rows = [("path", "split", "label", "xmin", "ymin", "xmax", "ymax")]
    for name, small, large in (("ant", 4, 1), ("bus", 3, 9)):
        sides = [(i, 20) for i in range(small)] + [(i, 60) for i in range(small, small + large)]
        rows += [(f"train/{name}/{i}.png", "train", "0", "0", "0", str(side), "30") for i, side in sides]
        rows += [(f"val/{name}/{side}.png", "val", "0", "0", "0", str(side), "30") for side in (0, 20, 60)]
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert forms.list_small_objects(tmp_path, tmp_path / "small.csv") == (1, 4, 1)
    with (tmp_path / "small.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found[0] == {"path": "train/ant/0.png", "split": "train", "label": "ant"}
    assert found[-1] == {"path": "val/ant/20.png", "split": "test", "label": "ant"}  # the box of one pixel is left out


def test_forms_are_measured_once(boxed: Path, digits_run: RunFolder, tmp_path: Path) -> None:
    """The table of a run whose classes are those of the photographs."""
    table_file = tmp_path / "forms.toml"
    table_file.write_text('seeds = [0]\ndata = [{recipe = "digits"}]\nrow = [{method = "as it is"}]\n')
    (job,) = load_table(table_file, [f"digits={boxed}"])
    (tmp_path / f"{job.name}.json").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / job.training).symlink_to(digits_run.path)
    printed = forms.table([job], tmp_path, boxed, 0, 0)
    assert printed.splitlines()[2].startswith("| digits | as it is | 1 | ")
    kept = json.loads((tmp_path / "boxes.json").read_text())[job.name]
    assert kept["mean"] == pytest.approx(np.mean([kept[name] for name in localisation.MEASURES]))
    (tmp_path / "runs" / job.training).unlink()
    assert forms.table([job], tmp_path, boxed, 0, 0) == printed


def test_an_archive_is_unpacked_once(boxed: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photographs.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(boxed, "photographs")
    root = unpack(archive, tmp_path / "work")
    assert (root / "boxes.csv").read_bytes() == (boxed / "boxes.csv").read_bytes()
    (root / "boxes.csv").unlink()
    assert unpack(archive, tmp_path / "work") == root and not (root / "boxes.csv").exists()


def test_our_maps_sum_to_the_logits_and_calibration_keeps_their_order(digits_run: RunFolder) -> None:
    network, _, _ = load_network(digits_run.network)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = maps.answer(network, images)
    assert found.maps.shape == (3, 10, 8, 8)
    assert found.maps.sum(axis=(2, 3)) == pytest.approx(found.logits, rel=1e-4, abs=1e-4)
    assert found.calibrated_maps.sum(axis=(2, 3)) == pytest.approx(found.calibrated_logits, rel=1e-4, abs=1e-4)
    plain, calibrated = (maps.scaled(m[:, 4], 32) for m in (found.maps, found.calibrated_maps))
    assert plain == pytest.approx(calibrated, abs=1e-3)
    off = maps.answer(maps.without_camc(network), images)
    assert network.camc is not None
    assert np.abs(maps.scaled(off.maps[:, 4], 32) - plain).max() > 0.01


def test_a_map_leans_to_its_class_by_a_part_that_sums_to_zero(digits_run: RunFolder) -> None:
    network = maps.without_camc(load_network(digits_run.network)[0])
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    labels, every = np.array([1, 7, 7]), np.arange(3)
    found = maps.answer(network, images)
    plain, half, along = (maps.leaning(network, images, labels, lean) for lean in (1, 0.5, 0))
    assert plain == pytest.approx(found.maps[every, labels], abs=1e-4)
    assert half == pytest.approx((plain + along) / 2, abs=1e-4)
    for kind in (plain, half, along):
        assert kind.sum(axis=(1, 2)) == pytest.approx(found.logits[every, labels], rel=1e-3, abs=1e-3)
    # Two classes of one image: without leaning, the same map in two units.
    other = maps.leaning(network, images, np.array([2, 2, 2]), 0)
    assert abs(np.corrcoef(other[0].ravel(), along[0].ravel())[0, 1]) == pytest.approx(1, abs=1e-4)
    # Grad-CAM's weights, the gradient of a normalised classifier, are at right angles to the mean: the leaning alone.
    features = network.features(torch.from_numpy(images)).detach().requires_grad_()
    logits = network.rescale(network.head(features.mean(dim=(2, 3))))
    logits[torch.arange(3), torch.from_numpy(labels)].sum().backward()
    assert features.grad is not None
    gradcam = (features.grad.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).detach().numpy()
    assert plain - along == pytest.approx(gradcam, rel=1e-3, abs=1e-4)


def test_mosaics_are_of_four_classes_that_are_recognised() -> None:
    labels = np.repeat(np.arange(6), 5)
    logits = (np.eye(6)[labels] * np.linspace(1, 9, 30)[:, None]).astype(np.float32)
    logits[labels == 5] = np.eye(6)[0]  # never recognised
    found = maps.Answers(logits, logits, logits, logits)
    chosen = mosaics.choose(found, labels, 50, seed=0)
    assert chosen.shape == (50, 4) and len(np.unique(chosen)) > 15
    assert all(len(set(row)) == 4 and 5 not in row for row in labels[chosen])
    assert np.array_equal(chosen, mosaics.choose(found, labels, 50, seed=0))
    with pytest.raises(ValueError, match="only 1 classes are recognised; a mosaic needs 4"):
        mosaics.choose(found, np.zeros(30, dtype=np.int64), 5, seed=0)


def test_our_maps_know_which_of_four_digits_is_asked_for(digits_run: RunFolder) -> None:
    network, recipe, _ = load_network(digits_run.network)
    test = load_dataset(recipe.data, recipe.seed).test
    labels = test.labels.numpy()
    groups = ["many" if label < 5 else "few" for label in labels]
    data = BoxedImages(images=test.images.numpy(), labels=labels, boxes=np.zeros((len(labels), 4), int), groups=groups)

    def corner(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> localisation.Maps:
        return np.repeat(peaked(0, 0, images.shape[1]), len(labels), axis=0)

    found = mosaics.compare(network, data, {"gradcam": corner}, 20, seed=0)
    shares = found["shares"]
    assert found["asked"]["all"] == 80 == found["asked"]["many"] + found["asked"]["few"]
    # Always the upper left corner is right for one of four. The centre has a quarter of everything.
    for of_method in shares.values():
        assert of_method["gradcam"]["all"] == 0.25 and of_method["centre"]["all"] == pytest.approx(0.25, abs=1e-3)
        assert of_method["calibrated"]["all"] > 0.35
    assert shares["cut"]["calibrated"] != shares["given"]["calibrated"]
    page = "\n".join(report._mosaics(found))
    assert "| maps as given, % | all (80) | many (" in page and "| Grad-CAM | 25.0 |" in page


def test_mosaics_stand_two_above_two_and_maps_are_judged_in_their_own_quarter() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)
    (picture,) = mosaics.compose(images, np.array([[4, 1, 2, 3]]))
    assert picture[::2, ::2, 0].tolist() == [[4, 1], [2, 3]] and picture.shape == (4, 4, 3)
    given = np.array([picture[..., 0], 0 * picture[..., 0]], dtype=np.float32)
    given[0, 3, 3] = -7  # what speaks against the class is left out
    found = [mosaics.shares(given, place).tolist() for place in range(4)]
    assert found == [[16 / 37, 0], [4 / 37, 0], [8 / 37, 0], [9 / 37, 0]]


def test_a_cut_map_starts_at_its_median() -> None:
    given = np.array([[[0.0, 0.2], [0.4, 1.0]], [[0.5, 0.5], [0.5, 1.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=np.float32)
    found = localisation.cut(given)
    assert found == pytest.approx(np.array([[[0, 0], [1 / 7, 1]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]]))


def test_drawn_maps_start_at_the_median_where_that_is_positive() -> None:
    given = np.array([[[1.0, 1.0], [1.0, 3.0]], [[-5.0, -5.0], [-5.0, 1.0]]], dtype=np.float32)
    pixels = maps.drawn(given, 2)
    assert pixels[0].tolist() == [[0, 0], [0, 1]] and pixels[1].tolist() == [[0, 0], [0, 1]]
    assert maps.drawn(-np.ones((1, 2, 2), dtype=np.float32), 4).max() == 0


def test_a_class_that_several_rules_choose_is_drawn_once() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)
    asked: list[tuple[int, int]] = []

    def draw(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> localisation.Maps:
        asked.extend((int(image[0, 0, 0]), int(label)) for image, label in zip(images, labels, strict=True))
        return (10 * images[:, :, :, 0] + labels[:, None, None]).astype(np.float32)

    classes = {"true": np.array([1, 2, 3]), "raw": np.array([1, 5, 3])}
    found = comparison.draw_each(draw, images, classes)
    assert sorted(asked) == [(0, 1), (1, 2), (1, 5), (2, 3)]
    assert found["true"][:, 0, 0].tolist() == [1, 12, 23] and found["raw"][:, 0, 0].tolist() == [1, 15, 23]


def test_speed_is_a_ratio_of_the_same_round() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)

    def busy(repeats: int) -> speed.Contender:
        return lambda images, classes: [np.linalg.svd(np.ones((40, 40))) for _ in range(repeats)]

    found = speed.measure({speed.OURS: busy(1), "slow": busy(20)}, images, rounds=5)
    assert found[speed.OURS]["ratio"] == 1 and found["slow"]["ratio"] > 4


def test_a_peer_draws_one_map_for_each_class() -> None:
    asked: list[tuple[int, list[int]]] = []

    def draw(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> localisation.Maps:
        asked.append((len(images), labels.tolist()))
        return np.zeros(images.shape[:3], dtype=np.float32)

    image = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    speed.measure({speed.OURS: speed.peer(draw)}, image, rounds=1, classes=3)
    assert asked == [(3, [0, 1, 2])] * speed.TURNS


def test_the_whole_benchmark_on_a_small_network(digits_run: RunFolder, boxed: Path) -> None:
    def corner(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> localisation.Maps:
        return np.repeat(peaked(0, 0, 32), len(labels), axis=0)

    peers = {"gradcam": corner}
    result = measure(digits_run, digits_run, boxed, peers, per_group=2, perturbed=1, mosaic=0, rounds=1)
    json.dumps(result)
    assert result["setup"]["grid"] == [8, 8] and result["setup"]["probes"] == len(result["setup"]["images"]) - 1
    assert result["order_changed"] < 1e-3
    others = {"plain", "with_camc", "camc_off", "centre", "gradcam"}
    assert {version: set(leads) for version, leads in result["leads"].items()} == {"given": others, "cut": others}
    everywhere = others | {"calibrated", "unmoved", "half", "along"}
    for of_rule in result["localisation"].values():
        assert all(set(of_method) == everywhere for of_method in of_rule.values())
        assert of_rule["raw"]["gradcam"]["all"]["pointing"] == 0
    assert set(result["faithfulness"]["cut"]) == everywhere - {"unmoved", "with_camc", "camc_off"}
    # The same network stands for the one trained with CAMC, so it cannot be ahead of itself.
    assert result["leads"]["given"]["with_camc"]["all"] == (0, 0, 0)
    assert set(result["speed"]["methods"]) == {"camcal", "camcal_int8", "camcal_torch", "forward", "gradcam"}
    assert set(result["speed"]["five_classes"]) == {"camcal", "camcal_int8", "camcal_torch", "gradcam"}

    page = report.markdown(json.loads(json.dumps(result)))
    assert "| **camcal, calibrated** |" in page and "| Grad-CAM |" in page and "| ≥ 20× |" in page
    assert "Score-CAM" not in page.partition("## What is measured")[0]


class EveryFourth(torch.nn.Module):
    """A trunk whose map is the first pixel of every four downwards, and the last across."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.mean(dim=1, keepdim=True)[:, :, 0::4, 3::4].expand(-1, 64, -1, -1)


def test_gradients_tell_how_far_a_map_lies_off_both_ways() -> None:
    network = LongTailClassifier(3, RULE, backbone="resnet8", head="linear").eval()
    network.trunk = EveryFourth()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(placement.lean(network, images), [[-0.375, 0.375]] * 3, atol=1e-6)


def test_the_gallery_is_chosen_by_lot() -> None:
    labels = np.repeat(np.arange(3), 10)
    chosen = gallery.choose(labels, [500, 50, 5], each=4, seed=0)
    assert labels[chosen].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(chosen, gallery.choose(labels, [500, 50, 5], each=4, seed=0))
    assert len(np.unique(chosen)) == 12


def test_the_gallery_shows_four_pictures_a_photograph(digits_run: RunFolder) -> None:
    network, _, _ = load_network(digits_run.network)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    def nothing(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> localisation.Maps:
        return np.zeros((len(labels), 32, 32), dtype=np.float32)

    picture = gallery.draw(network, images, np.array([0, 1, 2]), CLASSES, nothing)
    assert picture.width > 8 * gallery.TILE and 2 * gallery.TILE < picture.height < 4 * gallery.TILE


@pytest.mark.filterwarnings("ignore")  # pytorch-grad-cam's dependencies
@pytest.mark.parametrize("name", report.PEERS)
def test_peers_draw_the_network(digits_run: RunFolder, name: str) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="only in the benchmark's own environment")
    from tests.benchmarks.heatmaps.peers import ChannelsFirst, Peer

    network, _, _ = load_network(digits_run.network)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    model = ChannelsFirst(network)
    found = maps.answer(network, images)
    assert model(model.normalised(images)).detach().numpy() == pytest.approx(found.logits, abs=1e-4)
    off = maps.answer(maps.without_camc(network), images)
    chosen = off.logits.argmax(axis=1)
    drawn = Peer(name, network)(images, chosen)
    assert drawn.shape == (5, 32, 32) and drawn.min() >= 0 and drawn.max() <= 1
    if name == "cam":  # knows nothing of CAMC and shows nothing negative; else it is our plain map
        for ours, theirs in zip(off.maps[np.arange(5), chosen].clip(0), drawn[:, 1::4, 1::4], strict=True):
            assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9


def test_the_peers_are_pinned_with_hashes_and_without_an_index() -> None:
    pins = (Path(report.__file__).parent / "requirements.txt").read_text()
    required = [line for line in pins.splitlines() if line and not line.startswith((" ", "#"))]
    assert any(line.startswith("grad-cam==") for line in required) and all("==" in line for line in required)
    assert pins.count("--hash=sha256:") >= len(required)
    assert "://" not in pins and "--index" not in pins
