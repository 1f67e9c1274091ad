"""End-to-end tests with the real commands, a real server process and real digits."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from camcal.models.bundle import Bundle
from camcal.training.checkpoints import load_network
from camcal.training.data import load_dataset
from camcal.training.recipe import load_recipe
from camcal.training.run import RunFolder

CAMCAL = [sys.executable, "-c", "from camcal.__main__ import main; main()"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("CAMCAL_")}


@contextmanager
def _server(bundle: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [*CAMCAL, "serve", "--bundle", str(bundle), "--port", str(port)]
    process = subprocess.Popen(command, env=ENVIRONMENT | {"CAMCAL_DRAIN_S": "0"}, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 30
        while True:
            assert process.poll() is None, process.communicate()[1]
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < end, "the server did not become ready"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of `camcal train` in a separate process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = [*CAMCAL, "train", "digits", "--out", str(folder), "--set", "fit.epochs=5"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for text in ("trained in", "calibrated in", "few (2)", "ECE", "bundle digits"):
        assert text in result.stdout
    return RunFolder(folder)


def test_train_serve_and_predict_over_http(run: RunFolder) -> None:
    calibration = Bundle.load(run.bundle).manifest.calibration
    recipe = load_recipe("digits", ["fit.epochs=5"])
    images = load_dataset(recipe.data, recipe.seed).test.images[:8]
    network, _, _ = load_network(run.network)
    with torch.no_grad():
        logits = network(images)
        calibrated_logits = network.calibrate(logits)
        probabilities = (calibrated_logits / network.temperature).softmax(dim=1)

    with _server(run.bundle) as url:
        for i, image in enumerate(images.numpy()):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            response = httpx.post(f"{url}/predict?logits=all&top_k=10", files={"image": file.getvalue()})
            assert response.status_code == 200, response.text
            body = response.json()
            np.testing.assert_allclose(body["logits"], logits[i], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(body["calibrated_logits"], calibrated_logits[i], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(body["calibrated_probabilities"], probabilities[i], rtol=1e-3, atol=1e-4)
            for row in body["predictions"]:
                for calibrated, score in (("false", row["logit"]), ("true", row["calibrated_logit"])):
                    query = f"class={row['class_id']}&calibrated={calibrated}"
                    cam = httpx.get(f"{url}{body['cam']['url']}?format=json&{query}").json()
                    assert cam["label"] == row["label"]
                    assert np.shape(cam["contributions"]) == (8, 8)
                    assert np.sum(cam["contributions"]) == pytest.approx(score, rel=1e-4, abs=1e-4)
                    assert cam["score"] == pytest.approx(score)
                k, grid_sum = row["class_id"], row["logit"]
                offset = calibration.beta[k] * calibration.weight_norms[k]
                expected = calibration.omega[k] * grid_sum + offset
                assert row["calibrated_logit"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
            picture = httpx.get(f"{url}{body['cam']['url']}?size=200")
            with Image.open(io.BytesIO(picture.content)) as opened:
                assert opened.format == "PNG" and opened.size == (200, 200)
        metrics = httpx.get(f"{url}/metrics").text
    assert 'camcal_requests_total{code="200",route="/predict"} 8.0' in metrics


def test_command_line_equals_http(run: RunFolder, tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["fit.epochs=5"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(load_dataset(recipe.data, recipe.seed).test.images[:5].numpy()):
        Image.fromarray(image).save(pictures / f"{i}.png")
    out = tmp_path / "out.jsonl"
    command = [
        *CAMCAL,
        "predict",
        str(pictures),
        "--bundle",
        str(run.bundle),
        "--out",
        str(out),
        "--cam",
        str(tmp_path / "cams"),
    ]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=60)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5 and len(list((tmp_path / "cams").iterdir())) == 5
    with _server(run.bundle) as url:
        for i, row in enumerate(rows):
            body = httpx.post(f"{url}/predict", files={"image": (pictures / f"{i}.png").read_bytes()}).json()
            for offline, online in zip(row["predictions"], body["predictions"], strict=True):
                assert offline["label"] == online["label"]
                assert offline["calibrated_probability"] == pytest.approx(online["calibrated_probability"], abs=1e-5)
