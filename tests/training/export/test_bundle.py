import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from camcal.models.bundle import OUTPUTS
from camcal.models.classifier import ServedClassifier
from camcal.models.report import Report
from camcal.training.checkpoints import Trained, build_network, load_network
from camcal.training.data import load_dataset
from camcal.training.export.bundle import export_bundle
from camcal.training.export.graph import ExportError
from camcal.training.recipe import Recipe, load_recipe
from camcal.training.run import RunFolder


def test_branches_are_folded_into_the_bundle(digits_recipe: Recipe, digits_run: RunFolder, tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["model.head=linear", "model.reslt=cifar", "model.camc=off"])
    network = build_network(recipe, 10)
    images = load_dataset(digits_recipe.data, digits_recipe.seed).test.images[:20]
    with torch.no_grad():
        network.train()(images)
        network.eval().marc.beta.uniform_(-1, 1)
        expected = ServedClassifier(network)(images, torch.tensor(10))
    _, _, meta = load_network(digits_run.network)
    report = Report.read(digits_run.report)
    bundle = export_bundle(Trained(network, recipe, meta), report, tmp_path / "bundle")
    model = onnx.load(bundle.model_path)
    assert not [node for node in model.graph.node if node.op_type == "Stack"]
    assert not [i.name for i in model.graph.initializer if "branches" in i.name]
    session = onnxruntime.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])
    found = session.run(list(OUTPUTS), {"images": images.numpy(), "top_k": np.array(10)})
    for name, ours, theirs in zip(OUTPUTS, expected, found, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
    c = bundle.manifest.calibration
    sums, order = found[5].sum(axis=(2, 3)), found[4]
    offset = np.array(c.beta) * np.array(c.weight_norms)
    calibrated = np.take_along_axis(found[1], order, 1)
    np.testing.assert_allclose(np.array(c.omega)[order] * sums + offset[order], calibrated, rtol=1e-4, atol=1e-4)


def test_a_given_prior_is_in_the_manifest_and_no_other_is(digits_run: RunFolder, tmp_path: Path) -> None:
    network, recipe, meta = load_network(digits_run.network)
    report = Report.read(digits_run.report)
    given = recipe.model_copy(update={"calibrate": recipe.calibrate.model_copy(update={"prior": [1.0] * 9 + [11.0]})})
    bundle = export_bundle(Trained(network, given, meta), report, tmp_path / "bundle")
    assert bundle.manifest.prior == pytest.approx([0.05] * 9 + [0.55])
    assert "prior" not in json.loads((digits_run.bundle / "manifest.json").read_text())


@pytest.mark.parametrize("others", [["thesis.txt"], ["thesis.txt", "model.onnx"], ["model.onnx"]])
def test_a_folder_with_something_else_in_it_is_left_alone(
    digits_run: RunFolder, tmp_path: Path, others: list[str]
) -> None:
    for name in others:
        (tmp_path / name).write_text("years of work")
    network, recipe, meta = load_network(digits_run.network)
    said = f"holds {'thesis.txt' if 'thesis.txt' in others else 'model.onnx'}, which is not part of a bundle"
    with pytest.raises(ExportError, match=said):
        export_bundle(Trained(network, recipe, meta), Report.read(digits_run.report), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_file_beside_a_bundle_is_not_deleted_with_it(digits_run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(digits_run.bundle, folder)
    report = Report.read(digits_run.report)
    network, recipe, meta = load_network(digits_run.network)
    export_bundle(Trained(network, recipe, meta), report, folder)
    (folder / "notes.txt").write_text("years of work")
    with pytest.raises(ExportError, match="holds notes.txt"):
        export_bundle(Trained(network, recipe, meta), report, folder)
    assert (folder / "notes.txt").exists()
