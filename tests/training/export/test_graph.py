from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from camcal.models.bundle import INPUTS, OUTPUTS, Bundle
from camcal.models.classifier import ServedClassifier
from camcal.training.checkpoints import build_network, load_network
from camcal.training.data import load_dataset
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
        ["calibrate.views=flip", "model.camc=taught"],
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
    recipe = load_recipe("digits", overrides)
    network = build_network(recipe, 10)
    network.views = recipe.calibrate.views
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
