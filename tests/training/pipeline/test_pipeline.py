"""The second training, on all images. The steps themselves are tested where they are made, and end to end."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from camcal.models.bundle import Bundle
from camcal.models.report import Report
from camcal.training import pipeline
from camcal.training.calibration.calibrate import calibrate_retrained
from camcal.training.calibration.logits import predict_logits
from camcal.training.checkpoints import load_network, load_tensors, save_tensors
from camcal.training.data import load_dataset
from camcal.training.export import precision
from camcal.training.recipe import Recipe, RecipeError, load_recipe
from camcal.training.run import RunError, RunFolder
from tests.training.runs import make_run

QUICK = ["fit.epochs=2", "fit.warmup_epochs=1", "calibrate.iterations=50", "calibrate.passes=1"]
LEANING = [*QUICK, "calibrate.method=marc", "calibrate.marc_lean=true"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("digits", [*LEANING, "calibrate.refit=true"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> tuple[RunFolder, RunFolder, str]:
    """A run without the second training; the same with it, begun from the first one's checkpoint; and what it said."""
    plain, again = (RunFolder(tmp_path_factory.mktemp(name) / "run") for name in ("plain", "again"))
    pipeline.train(load_recipe("digits", LEANING), plain, Console(file=io.StringIO()))
    again.path.mkdir()
    again.checkpoint.write_bytes(plain.checkpoint.read_bytes())
    console = Console(file=io.StringIO(), width=200)
    pipeline.train(recipe, again, console)
    return plain, again, console.file.getvalue()  # type: ignore[attr-defined]


def report(run: RunFolder) -> Any:
    return json.loads(run.report.read_text())


def test_the_second_training_sees_all_images_and_keeps_what_was_fitted(runs: tuple[RunFolder, RunFolder, str]) -> None:
    plain, again, said = runs
    before, after = report(plain), report(again)
    images = before["data"]["train"] + before["data"]["holdout"]
    assert "continuing after epoch 2 of 2" in said and f"training again, on all {images} images" in said
    assert f"lean {after['calibration']['lean']:+.2f}, temperature" in said and after["calibration"]["lean"] != 0
    for key in ("scalar", "lean", "temperature", "prior_temperatures", "warnings"):
        assert after["calibration"][key] == pytest.approx(before["calibration"][key]), key
    assert after["test"]["trained"] != before["test"]["trained"]
    # What is said of held-out images is said of the network that has not seen them.
    for step in ("scalar", "adjusted"):
        wanted = before["temperature_only"][step]["temperature"]
        assert after["temperature_only"][step]["temperature"] == pytest.approx(wanted, rel=1e-3)
    held = [{k: v for k, v in row.items() if k.startswith("holdout_")} for row in before["scalar_curve"]]
    for row, wanted in zip(after["scalar_curve"], held, strict=True):
        assert {k: row[k] for k in wanted} == pytest.approx(wanted, abs=1e-3)
    network, first = (load_network(path)[0] for path in (again.network, again.before_refit))
    assert float(network.scalar) == pytest.approx(float(first.scalar))
    for name, tensor in load_network(plain.network)[0].state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], tensor, msg=name)
    assert "then trained again on all" in again.page.read_text()


def test_what_made_either_training_is_named(
    runs: tuple[RunFolder, RunFolder, str], recipe: Recipe, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(runs[1].path, run.path)
    tensors, meta = load_tensors(run.refit.checkpoint)
    later = meta["made_with"][-1] | {"commit": "a later one"}
    save_tensors(run.refit.checkpoint, tensors, meta | {"made_with": [later]})
    pipeline.calibrate_run(make_run(recipe, run))
    assert load_tensors(run.network)[1]["made_with"] == [*load_tensors(run.checkpoint)[1]["made_with"], later]


def test_the_second_network_serves_the_lean_of_the_first(
    runs: tuple[RunFolder, RunFolder, str], recipe: Recipe
) -> None:
    _, again, _ = runs
    served, _, meta = load_network(again.network)
    plain, _, _ = load_network(again.refit.checkpoint)
    data, fitted = load_dataset(recipe.data, recipe.seed), Report.read(again.report).calibration
    whole = make_run(recipe, again.refit, data.whole())
    upright = [each.model_copy(update={"lean": 0.0}) for each in fitted.candidates]
    calibrate_retrained(whole, plain, fitted.model_copy(update={"candidates": upright}))
    prior = torch.tensor(meta["train_counts"]) / sum(meta["train_counts"])
    with torch.no_grad():
        moved = (served.marc.beta - plain.marc.beta) * served.weight_norms() / served.temperature
    torch.testing.assert_close(moved, -fitted.lean * (prior * 10).log(), rtol=1e-3, atol=1e-4)


def test_the_bundle_is_of_the_second_network(runs: tuple[RunFolder, RunFolder, str]) -> None:
    _, again, _ = runs
    bundle = Bundle.load(again.bundle)
    assert json.loads((bundle.path / "report.json").read_text()) == report(again)
    assert bundle.manifest.calibration.temperature == pytest.approx(report(again)["calibration"]["temperature"])


def test_calibrating_before_the_second_training_is_refused(
    runs: tuple[RunFolder, RunFolder, str], recipe: Recipe, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    run.checkpoint.write_bytes(runs[0].checkpoint.read_bytes())
    data = load_dataset(recipe.data, recipe.seed)
    with pytest.raises(RunError, match="has no second training: run its `camcal train` again"):
        pipeline.calibrate_run(make_run(recipe, run, data))
    assert not run.network.exists()


def test_a_smaller_precision_is_judged_by_the_network_that_has_not_seen_the_held_out_images(
    runs: tuple[RunFolder, RunFolder, str], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, again, _ = runs
    compare, seen = precision.compare, []

    def watched(full: Path, *rest: Any) -> Any:
        seen.append(np.concatenate([out["logits"] for out in precision.served(full, data.holdout)]))
        return compare(full, *rest)

    data = load_dataset(recipe.data, recipe.seed)
    monkeypatch.setattr("camcal.training.export.bundle.compare", watched)
    monkeypatch.setattr(precision, "ALLOWED", 1.0)
    bundle = pipeline.export_run(make_run(recipe, again), tmp_path / "int8", "int8")
    before, after = (load_network(path)[0] for path in (again.before_refit, again.network))
    np.testing.assert_allclose(seen[0], predict_logits(before, data.holdout).numpy(), rtol=1e-3, atol=1e-3)
    exported = np.concatenate([out["logits"] for out in precision.served(bundle.model_path, data.test)])
    wanted = predict_logits(after, data.test).numpy()
    assert (exported.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.9


def test_a_report_of_another_calibration_is_not_exported(
    runs: tuple[RunFolder, RunFolder, str], recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(runs[0].path, tmp_path / "run")
    run = make_run(load_recipe("digits", [*QUICK, "calibrate.method=temperature"]), tmp_path / "run")
    pipeline.calibrate_run(run)
    with pytest.raises(RunError, match=r"report.json is of another calibration: run `camcal evaluate"):
        pipeline.export_run(run, tmp_path / "bundle")
    pipeline.evaluate_run(run)
    bundle = pipeline.export_run(run, tmp_path / "bundle")
    assert Report.read(bundle.path / "report.json").calibration.train_accuracy is None


def test_all_images_are_the_two_parts_one_after_the_other(recipe: Recipe) -> None:
    data = load_dataset(recipe.data, recipe.seed)
    whole = data.whole()
    assert len(whole.holdout) == 0 and len(whole.train) == len(data.train) + len(data.holdout)
    assert whole.train_counts().tolist() == data.train_counts().tolist()
    torch.testing.assert_close(whole.train.images[len(data.train) :], data.holdout.images)


@pytest.mark.parametrize("other", ["calibrate.marc_on=both", "calibrate.rescale=tau"])
def test_what_needs_held_out_images_of_the_last_network_is_refused(other: str) -> None:
    with pytest.raises(RecipeError, match="calibrate.refit needs"):
        load_recipe("digits", ["calibrate.refit=true", "model.head=linear", other])


def test_another_calibration_starts_from_the_last_one(runs: tuple[RunFolder, RunFolder, str], tmp_path: Path) -> None:
    _, again, _ = runs
    assert not load_network(again.checkpoint)[1].calibrate.refit  # the first training knew nothing of a second
    changed = pipeline.open_run(again, Console(), ["calibrate.exponent=1"]).recipe.calibrate
    assert changed.refit and changed.marc_lean and changed.exponent == 1
    alone = RunFolder(tmp_path)
    alone.checkpoint.write_bytes(again.checkpoint.read_bytes())
    assert not pipeline.open_run(alone, Console()).recipe.calibrate.refit


def test_a_finished_run_can_look_at_both_views(digits_run: RunFolder, tmp_path: Path) -> None:
    folder, console = RunFolder(tmp_path / "run"), Console(file=io.StringIO())
    shutil.copytree(digits_run.path, folder.path)
    pipeline.calibrate_run(pipeline.open_run(folder, console, ["calibrate.views=flip"]))
    before = Report.read(folder.report)
    run = pipeline.open_run(folder, console)
    found = pipeline.evaluate_run(run)
    bundle = pipeline.export_run(run)
    assert bundle.manifest.views == "flip" and Bundle.load(digits_run.bundle).manifest.views == "one"
    assert '"views"' not in (digits_run.bundle / "manifest.json").read_text().split('"recipe"')[0]
    # Calibration and report are of the averaged logits.
    test = run.data.test
    network = load_network(folder.checkpoint).network
    with torch.no_grad():
        both = [network(images).double().numpy() for images in (test.images, test.images.flip(2))]
    hits = np.mean(both, axis=0).argmax(axis=1) == test.labels.numpy()
    assert found.test["trained"].accuracy == pytest.approx(hits.mean(), abs=1e-6)
    assert found.calibration.temperature != before.calibration.temperature
    served = np.concatenate([outputs["calibrated_logits"] for outputs in precision.served(bundle.model_path, test)])
    judged = (served.argmax(axis=1) == test.labels.numpy()).mean()
    assert judged == pytest.approx(found.test["calibrated"].accuracy, abs=1.5 / len(test))
