"""The second model: a ResNet-50 at 224×224 pixels with random weights, exported like any other network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.bundle import MANIFEST_FILE
from training.config import parse_recipe
from training.export import export_bundle
from training.run import build_network

CLASSES = 1000


def resnet50(folder: Path) -> Path:
    """The bundle in `folder`, made once. Speed does not depend on the weights; the answers mean nothing."""
    if not (folder / MANIFEST_FILE).is_file():
        recipe = parse_recipe(
            {
                "name": "resnet50-random",
                "data": {"source": "digits", "resize": 256, "input_size": 224},
                "model": {"backbone": "resnet50"},
                "fit": {"epochs": 1},
            },
            "bench-serving",
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        names = [f"class {k}" for k in range(CLASSES)]
        report: dict[str, Any] = {"test": {"trained": {}, "calibrated": {}}}
        export_bundle(build_network(recipe, CLASSES), recipe, names, [100] * CLASSES, report, folder)
    return folder
