"""A ResNet-50 at 224×224 pixels with random weights, exported like any other network, in fp32 or fp16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from camcal.models.bundle import MANIFEST_FILE, MODEL_FILE, Bundle, sha256
from camcal.models.report import Figures, FittedCalibration, Report
from camcal.training.checkpoints import Trained, build_network
from camcal.training.export.bundle import export_bundle
from camcal.training.export.graph import write_graph
from camcal.training.export.precision import halve
from camcal.training.recipe import parse_recipe

CLASSES = 1000


def random_weights(folder: Path, backbone: str = "resnet50", precision: Literal["fp32", "fp16"] = "fp32") -> Path:
    """The bundle in `folder`, made once. Speed does not depend on the weights; the answers mean nothing."""
    if (folder / MANIFEST_FILE).is_file():
        return folder
    recipe = parse_recipe(
        {
            "name": f"{backbone}-random",
            "data": {"source": "digits", "resize": 256, "input_size": 224},
            "model": {"backbone": backbone},
            "fit": {"epochs": 1},
        },
        "bench-serving",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    network = build_network(recipe, CLASSES)
    report = _nothing_measured()
    meta = {"classes": [f"class {k}" for k in range(CLASSES)], "train_counts": [100] * CLASSES}
    export_bundle(Trained(network, recipe, meta), report, folder)
    if precision == "fp16":  # the export itself would judge it by held-out images, and there are none
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        (folder / MANIFEST_FILE).unlink()
        write_graph(halve(network), 224, folder / MODEL_FILE)
        manifest["files"][MODEL_FILE] = sha256(folder / MODEL_FILE)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"precision": precision}))
    Bundle.load(folder)
    return folder


def _nothing_measured() -> Report:
    nothing: dict[str, Any] = {}
    figures = Figures.model_construct(**nothing)
    calibration = FittedCalibration.model_construct(**nothing | {"prior_temperatures": {"train": 1.0}})
    known = {"test": {"trained": figures, "calibrated": figures}, "calibration": calibration}
    return Report.model_construct(**nothing | known)
