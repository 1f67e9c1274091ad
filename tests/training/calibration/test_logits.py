from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from camcal.models.classifier import LongTailClassifier
from camcal.models.report import Report
from camcal.training import pipeline
from camcal.training.calibration import logits as logits_module
from camcal.training.calibration.logits import TrainedLogits, predict_logits
from camcal.training.checkpoints import load_network
from camcal.training.data import Dataset, LabelledImages, load_dataset
from camcal.training.recipe import Recipe, parse_recipe
from camcal.training.run import RunFolder
from tests.training.runs import make_run


@pytest.fixture(scope="module")
def digits(digits_recipe: Recipe) -> Dataset:
    return load_dataset(digits_recipe.data, digits_recipe.seed)


@pytest.fixture
def network(digits_run: RunFolder) -> LongTailClassifier:
    return load_network(digits_run.network)[0]


def test_logits_do_not_depend_on_the_batch(
    digits_run: RunFolder, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    network: LongTailClassifier = load_network(digits_run.network)[0]
    test = load_dataset(digits_recipe.data, digits_recipe.seed).test
    part = LabelledImages(images=test.images[:20], labels=test.labels[:20])
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    whole = predict_logits(network, part)
    monkeypatch.setattr(logits_module, "PIXELS", 7 * 32**2)  # larger pictures go fewer at a time
    torch.testing.assert_close(predict_logits(network, part), whole, rtol=1e-4, atol=1e-4)
    assert sizes == [20, 7, 7, 6]


def _asked(network: LongTailClassifier) -> list[int]:
    """The sizes of the batches that the network is given from now on."""
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    return sizes


def test_kept_logits_are_those_of_the_trained_network(
    network: LongTailClassifier, digits: Dataset, digits_recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "logits.safetensors"
    first = TrainedLogits(network, path)
    found = first.holdout(digits), first.test(digits), first.train(digits, digits_recipe)
    assert first.seconds > 0
    assert len(found[2]) == digits_recipe.calibrate.passes * len(digits.train)
    network.rescale.factor.fill_(3.0)
    network.marc.beta.data.fill_(2.0)
    asked = _asked(network)
    again = TrainedLogits(network, path)
    for kept, computed in zip(
        (again.holdout(digits), again.test(digits), again.train(digits, digits_recipe)), found, strict=True
    ):
        assert kept.equal(computed)
    assert not asked and again.seconds == 0
    torch.testing.assert_close(found[1], predict_logits(network, digits.test) / 3, rtol=1e-4, atol=1e-4)


def test_logits_of_other_code_are_computed_anew(
    network: LongTailClassifier, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "logits.safetensors"
    TrainedLogits(network, path).holdout(digits)
    asked = _asked(network)
    monkeypatch.setattr("camcal.training.calibration.logits.code_digest", lambda: "edited since")
    TrainedLogits(network, path).holdout(digits)
    assert sum(asked) == len(digits.holdout)


@pytest.mark.parametrize(
    "change", ["weights", "views", "mean", "image", "augment.shift=1", "calibrate.passes=1", "seed=5"]
)
def test_logits_of_anything_else_are_computed_anew(
    network: LongTailClassifier, digits: Dataset, digits_recipe: Recipe, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "logits.safetensors"
    before = TrainedLogits(network, path).train(digits, digits_recipe)
    if change == "weights":
        with torch.no_grad():
            network.head.weight[0, 0] += 0.5
    elif change == "views":
        network.views = "flip"
    elif change == "mean":
        network.mean += 1
    elif change == "image":
        assert isinstance(digits.train, LabelledImages)
        pixels = digits.train.images.clone()
        pixels[0] = 255 - pixels[0]
        digits = replace(digits, train=LabelledImages(images=pixels, labels=digits.train.labels))
    else:
        digits_recipe = parse_recipe(digits_recipe.model_dump(mode="json"), "x", [change])
    changed = TrainedLogits(network, path)
    after = changed.train(digits, digits_recipe)
    assert changed.seconds > 0 and not after.equal(before)
    assert TrainedLogits(network, path).train(digits, digits_recipe).equal(after)


def test_a_damaged_file_is_written_anew(network: LongTailClassifier, digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "logits.safetensors"
    wanted = TrainedLogits(network, path).test(digits)
    path.write_bytes(path.read_bytes()[:100])
    assert TrainedLogits(network, path).test(digits).equal(wanted)
    asked = _asked(network)
    assert TrainedLogits(network, path).test(digits).equal(wanted) and not asked


def test_too_many_logits_are_not_kept(
    network: LongTailClassifier, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "logits.safetensors"
    monkeypatch.setattr(logits_module, "KEPT", 10 * (len(digits.test) + len(digits.holdout)) - 1)
    TrainedLogits(network, path).test(digits)
    TrainedLogits(network, path).holdout(digits)
    asked = _asked(network)
    TrainedLogits(network, path).test(digits)
    assert not asked
    TrainedLogits(network, path).holdout(digits)
    assert sum(asked) == len(digits.holdout)


def test_a_second_calibration_and_its_report_compute_no_logits(
    digits_run: RunFolder, digits_recipe: Recipe, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(digits_run.path, folder.path)
    before = Report.read(folder.report)
    monkeypatch.setattr(logits_module, "predict_logits", None)
    console = Console(file=io.StringIO(), width=200)
    run = make_run(digits_recipe, folder, digits, console)
    pipeline.calibrate_run(run)
    after = pipeline.evaluate_run(run)
    assert "s on cached logits: scalar" in console.file.getvalue()  # type: ignore[attr-defined]
    assert after.test == before.test and after.scalar_curve == before.scalar_curve
    assert after.calibration.logits_s == 0 < before.calibration.logits_s
