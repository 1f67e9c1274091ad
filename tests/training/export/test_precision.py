import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from typer.testing import CliRunner

from camcal.__main__ import app
from camcal.models.bundle import OUTPUTS, Bundle, Precision
from camcal.models.report import HeldOut, Report
from camcal.training.checkpoints import load_network
from camcal.training.data import Dataset, load_dataset
from camcal.training.export import bundle, precision
from camcal.training.export.graph import export_onnx
from camcal.training.export.precision import PrecisionError
from camcal.training.recipe import Recipe
from camcal.training.run import RunFolder

Bundles = dict[Precision, Path]


@pytest.fixture(scope="module")
def data(digits_recipe: Recipe) -> Dataset:
    return load_dataset(digits_recipe.data, digits_recipe.seed)


@pytest.fixture(scope="module")
def bundles(digits_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """The shipped demonstration in each precision, exported by the command."""
    folder = tmp_path_factory.mktemp("precision")
    found: Bundles = {"fp32": digits_run.bundle}
    for name in ("fp16", "int8"):
        command = ["export", str(digits_run.path), "--precision", name, "--out", str(folder / name)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert result.output.count("on held-out images") == 2
        found[precision.parse_precision(name)] = folder / name
    return found


def outputs(bundle: Path, images: torch.Tensor, top_k: int) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(list(OUTPUTS), {"images": images.numpy(), "top_k": np.array(top_k)})
    return dict(zip(OUTPUTS, found, strict=True))


@pytest.mark.parametrize(("name", "share"), [("fp16", 0.6), ("int8", 0.45)])
def test_a_smaller_bundle_is_smaller_verified_and_says_what_it_is(
    bundles: Bundles, name: Precision, share: float
) -> None:
    bundle = Bundle.load(bundles[name])
    assert bundle.manifest.precision == name
    assert (Report.read(bundle.path / "report.json").held_out or {}).keys() == {"fp32", name}
    full = (bundles["fp32"] / "model.onnx").stat().st_size
    assert bundle.model_path.stat().st_size < share * full
    assert b".py" not in bundle.model_path.read_bytes()


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_maps_through_a_smaller_graph_sum_to_its_own_logits(bundles: Bundles, data: Dataset, name: Precision) -> None:
    found = outputs(bundles[name], data.test.images[:100], 10)
    sums = found["maps"].sum(axis=(2, 3))
    top = found["top_classes"]
    np.testing.assert_allclose(sums, np.take_along_axis(found["logits"], top, 1), rtol=1e-4, atol=1e-4)
    c = Bundle.load(bundles[name]).manifest.calibration
    calibrated = np.array(c.omega)[top] * sums + (np.array(c.beta) * np.array(c.weight_norms))[top]
    expected = np.take_along_axis(found["calibrated_logits"], top, 1)
    np.testing.assert_allclose(calibrated, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "allowed", "agreement"), [("fp16", 1e-3, 0.99), ("int8", 1e-2, 0.92)])
def test_a_smaller_graph_answers_like_the_full_one(
    bundles: Bundles, data: Dataset, name: Precision, allowed: float, agreement: float
) -> None:
    full, smaller = (outputs(bundles[p], data.test.images, 1) for p in ("fp32", name))
    for output in OUTPUTS:
        assert full[output].dtype == smaller[output].dtype, output
    assert np.abs(full["probabilities"] - smaller["probabilities"]).mean() < allowed
    assert (full["top_classes"] == smaller["top_classes"]).mean() >= agreement
    assert (full["logits"] != smaller["logits"]).any()


def test_fp16_changes_the_trunk_alone(bundles: Bundles) -> None:
    types = {t.name: t.data_type for t in onnx.load(bundles["fp16"] / "model.onnx").graph.initializer}
    trunk = [kind for name, kind in types.items() if name.startswith("network.trunk.")]
    assert trunk and set(trunk) == {TensorProto.FLOAT16}
    assert types["network.marc.omega"] == TensorProto.FLOAT


def test_int8_changes_the_trunk_alone(bundles: Bundles) -> None:
    nodes = onnx.load(bundles["int8"] / "model.onnx").graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    for node in nodes:
        fed_by = {makers.get(name) for name in node.input}
        if node.op_type == "Conv":
            assert fed_by == {"DequantizeLinear"}
        if node.op_type in ("Gemm", "MatMul", "ReduceMean", "ReduceL2"):
            assert "DequantizeLinear" not in fed_by


@pytest.fixture
def damaged(digits_run: RunFolder, tmp_path: Path) -> Path:
    """The graph of the same network with the filters of its first layer in another order."""
    network, _, _ = load_network(digits_run.network)
    with torch.no_grad():
        first = next(p for p in network.trunk.parameters() if p.dim() == 4)
        first.copy_(first.roll(1, dims=0))
    export_onnx(network, 32, tmp_path / "damaged.onnx")
    return tmp_path / "damaged.onnx"


def test_answers_that_got_worse_are_refused_with_both_figures(
    digits_run: RunFolder, data: Dataset, damaged: Path
) -> None:
    with pytest.raises(PrecisionError, match=r"int8 would .* on 79 .* accuracy goes from [89].* to .* and ECE from"):
        precision.compare(digits_run.bundle / "model.onnx", damaged, "int8", data, 1.0)


def test_a_refused_precision_ends_in_one_sentence_and_leaves_nothing_behind(
    digits_run: RunFolder, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "quantize", lambda _source, target, _train: shutil.copy(damaged, target))
    out = damaged.parent / "bundle"
    result = CliRunner().invoke(app, ["export", str(digits_run.path), "--precision", "int8", "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: int8 would change the answers too much") and result.stderr.count("\n") == 1
    assert list(damaged.parent.iterdir()) == [damaged]


def test_a_loss_of_half_a_point_is_allowed_and_more_is_not(
    digits_run: RunFolder, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = digits_run.bundle / "model.onnx"
    wide = dataclasses.replace(data, holdout=data.test)
    figures = iter([HeldOut(accuracy=0.8, ece=0.03), HeldOut(accuracy=0.7951, ece=0.0349)] * 2)
    monkeypatch.setattr(precision, "_held", lambda *_: next(figures))
    assert len(wide.holdout) > 200 > len(data.holdout)
    precision.compare(path, path, "fp16", wide, 1.0)
    figures = iter([HeldOut(accuracy=0.8, ece=0.03), HeldOut(accuracy=0.8, ece=0.0351)] * 2)
    with pytest.raises(PrecisionError, match=r"ECE from 3.00% to 3.51%; 0.5% is allowed for each"):
        precision.compare(path, path, "fp16", wide, 1.0)
    # Half a point of 79 images is less than one of them: one is allowed.
    precision.compare(path, path, "fp16", data, 1.0)


def test_a_map_that_misses_its_logit_is_refused() -> None:
    found = {"logits": np.array([[3.0, 1.0]]), "top_classes": np.array([[0]]), "maps": np.full((1, 1, 2, 2), 0.75)}
    precision._check_maps(found)
    with pytest.raises(PrecisionError, match="a map's sum differs from its logit by 1.3e-03; allowed: 0.0001"):
        precision._check_maps(found | {"maps": np.full((1, 1, 2, 2), 0.751)})


def test_a_manifest_from_before_precisions_loads(bundles: Bundles, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for file in bundles["fp32"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("precision") == "fp32"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle.load(folder).manifest.precision == "fp32"


def test_a_graph_is_judged_under_the_training_prior(digits_run: RunFolder, data: Dataset) -> None:
    prior, temperature = data.train_counts() / data.train_counts().sum(), 1.7
    path = digits_run.bundle / "model.onnx"
    z = outputs(digits_run.bundle, data.holdout.images, 1)["calibrated_logits"].astype(np.float64)
    p = np.exp(z / temperature) * prior
    p /= p.sum(axis=1, keepdims=True)
    right, sure = p.argmax(axis=1) == data.holdout.labels.numpy(), p.max(axis=1)
    bins = np.ceil(sure * 15)
    ece = sum(abs((right[bins == b] - sure[bins == b]).sum()) for b in set(bins)) / len(sure)
    found = precision.compare(path, path, "fp16", data, temperature)["fp32"]
    assert vars(found) == pytest.approx({"accuracy": right.mean(), "ece": ece}, rel=1e-4)
    assert (np.exp(z).argmax(axis=1) != p.argmax(axis=1)).any()
