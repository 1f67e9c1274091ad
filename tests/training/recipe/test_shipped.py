"""The shipped recipes: each is valid, and those of the large benchmarks run from list file to bundle."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from camcal.training import pipeline
from camcal.training.checkpoints import build_network
from camcal.training.data import load_dataset
from camcal.training.data.dataset import long_tail_counts
from camcal.training.data.sources import preprocessing_of
from camcal.training.export.verify import verify
from camcal.training.recipe import RECIPES, load_recipe
from camcal.training.run import RunFolder

# How each benchmark names its files: (training, test) path of image i of a class.
LAYOUTS = {
    "imagenet-lt": ("train/n0{label}/n0{label}_{i}.jpg", "val/n0{label}/ILSVRC2012_val_{label}{i}.jpg"),
    "places-lt": ("data_256/a/place{label}/0000{i}.jpg", "val/place{label}/Places365_val_0{label}{i}.jpg"),
    "inat18": ("train_val2018/Plantae/{label}/a{label}b{i}.jpg", "train_val2018/Plantae/{label}/c{label}d{i}.jpg"),
}
COUNTS = (9, 5, 3, 2)
SMALL = [
    "model.backbone=resnet8",
    "model.weights=none",
    "data.resize=36",
    "data.input_size=32",
    "fit.epochs=1",
    "fit.batch_size=6",
    "calibrate.iterations=5",
    "calibrate.batch_size=8",
]


def _write_images(root: Path, pattern: str, counts: tuple[int, ...]) -> str:
    """Small photographs in one benchmark's layout; returns the text of the list file that names them."""
    lines = []
    for label, count in enumerate(counts):
        for i in range(count):
            name = pattern.format(label=label, i=i)
            pixels = np.random.default_rng(100 * label + i).integers(0, 60, (48, 64, 3), dtype=np.uint8) + 40 * label
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name)
            lines.append(f"{name} {label}\n")
    return "".join(lines)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmark_runs_from_its_lists_to_a_bundle(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    recipe = load_recipe(name, [*SMALL, f"data.root={root}"])
    assert recipe.data.source == "list" and recipe.data.train_list and recipe.data.test_list
    for pattern, counts, file in zip(
        LAYOUTS[name], (COUNTS, (2, 2, 2, 2)), (recipe.data.train_list, recipe.data.test_list), strict=True
    ):
        text = _write_images(root, pattern, counts)
        (root / file).write_text(text)
    bundle = pipeline.train(recipe, RunFolder(tmp_path / "run"), Console(file=io.StringIO()))
    assert bundle is not None
    assert [c.train_count for c in bundle.manifest.classes] == list(COUNTS)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["data"]["test"] == 8


@pytest.mark.parametrize(
    ("name", "largest", "total"),
    [
        ("cifar10-lt", 5000, 12406),
        ("cifar10-lt-reslt", 5000, 12406),
        ("cifar10-lt-marc", 5000, 12406),
        ("cifar100-lt", 500, 10847),
    ],
)
def test_a_cifar_recipe_runs_from_packed_arrays_to_a_bundle_that_keeps_its_word(
    name: str, largest: int, total: int, tmp_path: Path
) -> None:
    random, classes = np.random.default_rng(0), 50_000 // largest
    tones = random.integers(60, 196, (classes, 1, 1, 3))  # a class is known by its colour

    def images(labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        noise = random.integers(-60, 60, (len(labels), 32, 32, 3), dtype=np.int8)
        return np.asarray((tones.astype(np.int16)[labels] + noise).astype(np.uint8))

    train = np.arange(classes).repeat(long_tail_counts(largest, classes, 100))  # no more than is taken
    test = np.arange(classes).repeat(3)
    np.savez(
        tmp_path / "data.npz",
        train_images=images(train),
        train_labels=train,
        test_images=images(test),
        test_labels=test,
        class_names=np.array([f"class {k}" for k in range(classes)]),
    )
    settings = [
        "model.backbone=resnet8",
        "fit.epochs=1",
        "fit.milestones=[]",
        "data.holdout_fraction=0.8",
        "calibrate.passes=1",
    ]
    recipe = load_recipe(name, [*settings, "calibrate.iterations=50", f"data.root={tmp_path / 'data.npz'}"])
    bundle = pipeline.train(recipe, RunFolder(tmp_path / "run"), Console(file=io.StringIO()))
    assert bundle is not None
    counts = [c.train_count for c in bundle.manifest.classes]
    assert (sum(counts), counts[0], counts[-1]) == (total, largest, largest // 100)
    verify(bundle, load_dataset(recipe.data, recipe.seed), Console(file=io.StringIO()))


def test_the_large_benchmarks_have_the_papers_settings() -> None:
    recipes = {name: load_recipe(name) for name in LAYOUTS}
    backbones = {name: (r.model.backbone, r.model.weights) for name, r in recipes.items()}
    assert backbones == {
        "imagenet-lt": ("resnext50_32x4d", None),
        "places-lt": ("resnet152", "IMAGENET1K_V1"),
        "inat18": ("resnet50", None),
    }
    assert {name: r.fit.epochs for name, r in recipes.items()} == {"imagenet-lt": 180, "places-lt": 30, "inat18": 200}
    assert all((r.data.resize, r.data.input_size, r.augment.area) == (256, 224, (0.08, 1.0)) for r in recipes.values())
    assert {name: (r.fit.batch_size, r.fit.lr, r.fit.weight_decay) for name, r in recipes.items()} == {
        "imagenet-lt": (256, 0.1, 5e-4),
        "places-lt": (128, 0.01, 5e-4),
        "inat18": (256, 0.1, 1e-4),
    }
    warm_ups = {name: r.fit.warmup_epochs for name, r in recipes.items()}
    assert warm_ups == {"imagenet-lt": 5, "places-lt": 0, "inat18": 5}
    assert (recipes["imagenet-lt"].loss.branch_beta, recipes["inat18"].loss.branch_beta) == (0.99, 0.85)


@pytest.mark.parametrize(("classes", "beta", "ranks"), [(10, 0.998, (2, 4)), (100, 0.995, (35, 70))])
def test_reslt_on_cifar_has_the_paper_s_settings(classes: int, beta: float, ranks: tuple[int, int]) -> None:
    recipe = load_recipe(f"cifar{classes}-lt-reslt", ["data.root=somewhere"])
    fit, augment = recipe.fit, recipe.augment
    assert (fit.epochs, fit.batch_size, fit.lr, fit.momentum, fit.weight_decay) == (200, 128, 0.1, 0.9, 5e-4)
    assert (fit.warmup_epochs, fit.milestones) == (5, [160, 180])
    assert (augment.flip, augment.shift, augment.policy, augment.erase) == (True, 4, "none", 0)
    assert (recipe.model.backbone, recipe.model.head, recipe.model.reslt) == ("resnet32", "linear", "cifar")
    assert (recipe.loss.name, recipe.loss.branch_beta, recipe.loss.branch_ranks) == ("cross_entropy", beta, ranks)


@pytest.mark.parametrize(("classes", "images"), [(10, 11165), (100, 9754)])
def test_marc_on_cifar_has_the_paper_s_settings(classes: int, images: int) -> None:
    recipe = load_recipe(f"cifar{classes}-lt-marc", ["data.root=somewhere"])
    fit, augment, margins = recipe.fit, recipe.augment, recipe.calibrate
    counts = long_tail_counts(50_000 // classes, classes, 100)
    assert images == sum(n - max(1, round(0.1 * n)) for n in counts)
    batches = math.ceil(images / 512)
    assert abs(fit.epochs * batches - 13_000) <= batches / 2 and abs(fit.warmup_epochs * batches - 800) <= batches / 2
    assert (fit.batch_size, fit.lr, fit.momentum, fit.weight_decay) == (512, 0.1, 0.9, 5e-4)
    assert (augment.flip, augment.shift, augment.policy) == (True, 4, "autoaugment-cifar10")
    assert (augment.erase, augment.erase_fill) == (0.5, "black")
    assert (recipe.model.backbone, recipe.model.head, recipe.loss.name) == ("resnet32", "linear", "cross_entropy")
    assert (margins.iterations, margins.warmup, margins.batch_size, margins.lr) == (2000, 800, 512, 0.1)
    assert (margins.weight_decay, margins.exponent) == (5e-4, 1.2)
    assert (margins.method, margins.marc_on, margins.marc_lean) == ("marc", "train", False)


@pytest.mark.parametrize("size", [128, 160, 224, 256, 320, 384])
@pytest.mark.parametrize("fit", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("name", ["photos", "photos-fast", "photos-from-scratch"])
def test_photographs_of_any_size_from_128_to_384(name: str, fit: str, size: int) -> None:
    changes = [f"data.resize={size}", f"data.input_size={size}", f"data.fit={fit}"]
    recipe = load_recipe(name, ["data.root=somewhere", *changes])
    assert preprocessing_of(recipe.data).place(3, 3) == (0, 0, size, size)


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.toml"))])
def test_every_shipped_recipe_is_valid_and_bears_its_file_s_name(name: str) -> None:
    assert load_recipe(name, ["data.root=somewhere"]).name == name


def test_missing_data_is_explained_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = load_recipe("imagenet-lt", [f"data.root={tmp_path}"])
    with pytest.raises(ValueError, match=r"ImageNet_LT_train\.txt cannot be read"):
        load_dataset(recipe.data, 0)


def test_pretrained_weights_that_do_not_exist_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="resnet152 has no weights 'IMAGENET22K_V9'"):
        build_network(load_recipe("places-lt", ["model.weights=IMAGENET22K_V9"]), 365)
