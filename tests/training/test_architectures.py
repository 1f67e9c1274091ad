"""Networks of timm's from random weights to a served prediction: convolutional ones and transformers."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from camcal.models.backbones import build_backbone
from camcal.models.timm_trunk import TimmTrunk
from camcal.service.http.app import create_app
from camcal.service.settings import Settings
from camcal.training import pipeline
from camcal.training.checkpoints import load_tensors
from camcal.training.data import load_dataset
from camcal.training.recipe import load_recipe
from camcal.training.run import RunFolder

with warnings.catch_warnings():
    # Starlette asks for another client library than httpx from its next major version on.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient


@pytest.mark.parametrize(
    ("name", "settings", "grid"),
    [
        ("test_resnet", ["model.head=linear", "model.output_stride=8"], [4, 4]),
        ("test_convnext", ["model.neck=24"], [1, 1]),
        ("test_efficientnet", ["model.neck=last"], [1, 1]),
        ("test_mambaout", ["model.reslt=cifar"], [1, 1]),
        ("test_vit", ["model.camc=taught"], [2, 2]),
        ("vit_tiny_patch16_224", ["model.camc=prototypes", "model.neck=32"], [2, 2]),
    ],
)
def test_from_random_weights_to_an_explained_prediction(
    name: str, settings: list[str], grid: list[int], tmp_path: Path
) -> None:
    _explained(name, settings, grid, tmp_path)


@pytest.mark.parametrize("changes", [[], ["fit.ema=0.9", "fit.frozen_stages=2"]])
def test_an_adapted_transformer_goes_to_an_explained_prediction_too(changes: list[str], tmp_path: Path) -> None:
    trunk, _ = build_backbone("timm/test_vit", None, 32)
    assert isinstance(trunk, TimmTrunk)
    save_file(trunk.network.state_dict(), tmp_path / "own.safetensors")
    settings = [f"model.weights={tmp_path / 'own.safetensors'}", "fit.lora=2", "fit.mode=head-then-all", *changes]
    _explained("test_vit", [*settings, "fit.head_epochs=1", "fit.optimizer=adamw"], [2, 2], tmp_path / "run")
    tensors, _ = load_tensors(RunFolder(tmp_path / "run").network)
    before = {f"network.trunk.network.{name}": tensor for name, tensor in trunk.network.state_dict().items()}
    assert before.keys() == {name for name in tensors if name.startswith("network.trunk.")}
    changed = {name for name in before if not torch.equal(before[name], tensors[name])}
    first = 1 if changes else 0
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"network.trunk.network.blocks.{i}.{part}.weight" for i in range(first, 6) for part in parts}


def _explained(name: str, settings: list[str], grid: list[int], folder: Path) -> None:
    few = ["fit.epochs=1", "calibrate.iterations=20", "calibrate.passes=1", "data.imbalance=10", "fit.lr=0.01"]
    off = [] if any("camc" in setting for setting in settings) else ["model.camc=off"]
    recipe = load_recipe("digits", [*few, *off, f"model.backbone=timm/{name}", *settings])
    bundle = pipeline.train(recipe, RunFolder(folder), Console(file=io.StringIO()))
    assert bundle is not None
    file = io.BytesIO()
    Image.fromarray(load_dataset(recipe.data, 0).test.images[0].numpy()).save(file, "PNG")
    with TestClient(create_app(Settings(bundle=bundle.path))) as client:
        answer = client.post("/predict?logits=all&top_k=10", files={"image": file.getvalue()}).json()
        assert answer["cam"]["grid"] == grid
        for row in answer["predictions"]:
            query = f"?format=json&calibrated=false&class={row['class_id']}"
            cam = client.get(answer["cam"]["url"] + query).json()
            assert np.shape(cam["contributions"]) == tuple(grid)
            assert np.sum(cam["contributions"]) == pytest.approx(row["logit"], rel=1e-4, abs=1e-4)
