"""The benchmark of a device, on the CPU and with a small network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.serving import device


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes."""
    folder = tmp_path_factory.mktemp("device")
    options = {"device": "cpu", "backbone": "resnet18_slim", "batches": "1,2", "workers": "1", "clients": 4}
    device.main(**options, precision="fp16", seconds=0.2, out=folder)  # type: ignore[arg-type]  # mixed
    return folder


def test_every_stage_is_measured(out: Path) -> None:
    results = json.loads((out / "device.json").read_text())
    rates = [row[kind] for row in results["curve"] for kind in ("onnxruntime", "resident", "camcal")]
    rates += [results["queue"], results["decode"]]
    rates += [entry[kind] for entry in results["service"] for kind in ("photographs", "pixels")]
    assert len(rates) == 10
    assert all(rate > 0 for rate in rates)
    assert results["precision"] == "fp16"
    assert [row["batch"] for row in results["curve"]] == [1, 2]


def test_page_has_the_rates(out: Path) -> None:
    results = json.loads((out / "device.json").read_text())
    page = (out / "device.md").read_text()
    row = results["curve"][1]
    assert f"| 2 | {row['resident']:.0f} | {row['onnxruntime']:.0f} | {row['camcal']:.0f} |" in page


@pytest.mark.parametrize(
    ("decode", "pixels", "device_", "words"),
    [
        (20.0, 60.0, 100.0, "decoding, which makes 20 a second"),
        (90.0, 60.0, 100.0, "HTTP, and what Python does for each request, which makes 60 a second"),
        (900.0, 95.0, 100.0, "the device, which makes 100 a second"),
    ],
)
def test_what_holds_up_the_rest(decode: float, pixels: float, device_: float, words: str) -> None:
    services = [{"pixels": pixels / 2, "photographs": 9.0}, {"pixels": pixels, "photographs": 10.0}]
    said = device.bottleneck({"decode": decode, "service": services}, device_)
    assert said == f"Photographs come through at 10 a second. What holds them up is {words} without the rest."
