import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from camcal.models.bundle import INPUTS, OUTPUTS, Bundle
from camcal.models.classifier import ServedClassifier
from camcal.models.report import Report
from camcal.training.checkpoints import Trained, build_network, load_network
from camcal.training.data import load_dataset
from camcal.training.export.bundle import export_bundle
from camcal.training.export.graph import ExportError, check_parity, export_onnx
from camcal.training.recipe import Recipe, load_recipe
from camcal.training.run import RunFolder


@pytest.mark.parametrize(("batch", "top_k"), [(1, 1), (7, 3), (5, 10)])
def test_onnx_and_pytorch_agree_on_real_images(
    digits_run: RunFolder, digits_recipe: Recipe, batch: int, top_k: int
) -> None:
    images = load_dataset(digits_recipe.data, digits_recipe.seed).test.images[:batch]
    network, _, _ = load_network(digits_run.network)
    with torch.no_grad():
        expected = ServedClassifier(network)(images, torch.tensor(top_k))
    session = onnxruntime.InferenceSession(str(digits_run.bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(list(OUTPUTS), {"images": images.numpy(), "top_k": np.array(top_k)})
    for name, ours, theirs in zip(OUTPUTS, expected, found, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


def test_maps_through_the_exported_graph_sum_to_logits(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    images = load_dataset(digits_recipe.data, digits_recipe.seed).test.images[:50].numpy()
    session = onnxruntime.InferenceSession(str(digits_run.bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    logits, calibrated, _, _, top, maps = session.run(list(OUTPUTS), {"images": images, "top_k": np.array(10)})
    c = Bundle.load(digits_run.bundle).manifest.calibration
    sums = maps.sum(axis=(2, 3))
    np.testing.assert_allclose(sums, np.take_along_axis(logits, top, 1), rtol=1e-4, atol=1e-4)
    omega, offset = np.array(c.omega), np.array(c.beta) * np.array(c.weight_norms)
    expected = np.take_along_axis(calibrated, top, 1)
    np.testing.assert_allclose(omega[top] * sums + offset[top], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.head=causal", "model.camc=both", "model.camc_attention=softmax", "model.camc_top=2"],
        ["model.head=cosnorm", "model.reslt=cifar", "model.camc=weights"],
        ["model.head=linear", "model.reslt=large", "model.camc=off"],
    ],
    ids=lambda o: "-".join(setting.split("=")[1] for setting in o),
)
def test_maps_of_every_kind_of_network_are_exact_in_the_graph(
    overrides: list[str], digits_recipe: Recipe, tmp_path: Path
) -> None:
    images = load_dataset(digits_recipe.data, digits_recipe.seed).test.images[:20]
    network = build_network(load_recipe("digits", overrides), 10)
    with torch.no_grad():
        network.train()(images, torch.arange(20) % 10)
        network.eval().rescale.factor.fill_(1.5)
        network.rescale.scale.uniform_(0.5, 2)
        network.rescale.shift.uniform_(-1, 1)
        network.marc.omega.uniform_(0.5, 2)
        network.marc.beta.uniform_(-1, 1)
        offset = (network.marc.beta * network.weight_norms()).numpy()
    export_onnx(network, 32, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    outputs = session.run(list(OUTPUTS), {"images": images.numpy(), "top_k": np.array(10)})
    logits, calibrated, _, _, top, maps = outputs
    sums = maps.sum(axis=(2, 3))
    np.testing.assert_allclose(sums, np.take_along_axis(logits, top, 1), rtol=1e-4, atol=1e-4)
    expected = np.take_along_axis(calibrated, top, 1)
    np.testing.assert_allclose(
        network.marc.omega.detach().numpy()[top] * sums + offset[top], expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("backbone", "trained"), [("resnet8", False), ("resnet18", True)])
@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_attention_without_any_spread_is_even_in_the_graph_too(
    backbone: str, trained: bool, form: str, digits_recipe: Recipe, tmp_path: Path
) -> None:
    """No class has a prototype yet, or the map has one position only."""
    images = load_dataset(digits_recipe.data, digits_recipe.seed).test.images[:20]
    recipe = load_recipe(
        "digits", ["model.camc=prototypes", f"model.camc_attention={form}", f"model.backbone={backbone}"]
    )
    network = build_network(recipe, 10)
    if trained:
        with torch.no_grad():
            network.train()(images, torch.arange(20) % 10)
    with torch.no_grad():
        positions = network.eval().features(images).shape[2:].numel()
    assert (positions == 1) == trained
    export_onnx(network, 32, tmp_path / "model.onnx")  # which compares what the two make of images


def test_a_network_that_says_nothing_finite_is_refused(digits_run: RunFolder, tmp_path: Path) -> None:
    network, _, _ = load_network(digits_run.network)
    with torch.no_grad():
        network.marc.beta[3] = torch.nan
    with pytest.raises(ExportError, match="output calibrated_logits is not finite"):
        export_onnx(network, 32, tmp_path / "model.onnx")


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


def test_the_graph_has_the_contracts_names_and_no_trace_of_where_it_was_made(digits_run: RunFolder) -> None:
    data = (digits_run.bundle / "model.onnx").read_bytes()
    model = onnx.load_from_string(data)
    assert [i.name for i in model.graph.input] == list(INPUTS)
    assert [o.name for o in model.graph.output] == list(OUTPUTS)
    assert b"/models/" not in data and b".py" not in data


def test_a_graph_that_computes_something_else_is_refused(digits_run: RunFolder, tmp_path: Path) -> None:
    network, _, _ = load_network(digits_run.network)
    path = tmp_path / "model.onnx"
    export_onnx(network, 32, path)
    with torch.no_grad():
        network.marc.beta.add_(0.01)
    with pytest.raises(ExportError, match="output calibrated_logits differs by .* between ONNX and PyTorch"):
        check_parity(ServedClassifier(network), path, torch.zeros(1, 32, 32, 3, dtype=torch.uint8), 2)


def test_classes_that_tie_may_come_in_either_order(digits_run: RunFolder, tmp_path: Path) -> None:
    network, _, _ = load_network(digits_run.network)
    with torch.no_grad():
        network.head.weight.copy_(network.head.weight[:1].expand_as(network.head.weight))
        network.marc.omega.fill_(1)
        network.marc.beta.zero_()
    path = tmp_path / "model.onnx"
    export_onnx(network, 32, path)
    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)

    class Backwards(ServedClassifier):
        def forward(self, images: torch.Tensor, top_k: torch.Tensor) -> tuple[torch.Tensor, ...]:
            *others, classes, maps = super().forward(images, top_k)
            return *others, classes.flip(1), maps.flip(1)

    check_parity(Backwards(network), path, images, 10)
    with torch.no_grad():
        network.marc.beta[3] += 1  # now its place matters
    export_onnx(network, 32, path)
    with pytest.raises(ExportError, match="output top_classes differs"):
        check_parity(Backwards(network), path, images, 10)


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
