"""The ONNX graph of a network, compared with PyTorch before it is released."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from camcal.models.bundle import INPUTS, OUTPUTS
from camcal.models.classifier import LongTailClassifier, ServedClassifier

TOLERANCE = 1e-4
MAX_BATCH = 65535


class ExportError(ValueError):
    """A graph that differs from its network, or a folder that cannot hold a bundle."""


def export_onnx(network: LongTailClassifier, size: int, path: Path) -> None:
    """Write the serving graph of a network for images of size×size, and check it against PyTorch.

    Raises:
        ExportError: if ONNX Runtime's outputs differ from PyTorch's by more than 1e-4, relative to values above one.
    """
    examples = write_graph(network, size, path)
    served = ServedClassifier(network)
    for count, top_k in ((3, 2), (1, network.marc.omega.numel())):
        check_parity(served, path, examples[:count], top_k)


def write_graph(network: LongTailClassifier, size: int, path: Path) -> torch.Tensor:
    """Write the graph; returns images to test it with."""
    served = ServedClassifier(network.eval().cpu()).eval()
    examples = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter warns of deprecations in its own dependencies; its result is checked below.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            served,
            (examples, torch.tensor(2)),
            dynamo=True,
            verbose=False,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes={"images": {0: batch}, "top_k": None},
        )
    assert program is not None
    model = program.model_proto
    strip(model)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return examples


def strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes about its source: stack traces with local paths, and names of modules."""
    del model.metadata_props[:]
    for part in (model.graph, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""
        for node in part.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def check_parity(served: ServedClassifier, path: Path, images: torch.Tensor, top_k: int) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected: list[NDArray[Any]] = [output.numpy() for output in served(images, torch.tensor(top_k))]
    found = session.run(list(OUTPUTS), {"images": images.numpy(), "top_k": np.array(top_k, dtype=np.int64)})
    pairs = dict(zip(OUTPUTS, zip(expected, found, strict=True), strict=True))
    for name, (ours, theirs) in pairs.items():
        if ours.shape != theirs.shape:
            raise ExportError(f"output {name} has shape {theirs.shape} in ONNX and {ours.shape} in PyTorch")
        if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
            raise ExportError(f"output {name} is not finite: the network's weights or its calibration are broken")
    # With thousands of classes, rounding decides the order of some: classes in the same place must have the same logit,
    # and maps are compared where the class is the same.
    places = pairs["top_classes"]
    same_Nk = places[0] == places[1]
    calibrated_NK = pairs["calibrated_logits"][0]
    ours_Nk, theirs_Nk = (np.take_along_axis(calibrated_NK, classes, axis=1) for classes in places)
    pairs |= {"top_classes": (ours_Nk, theirs_Nk), "maps": tuple(maps[same_Nk] for maps in pairs["maps"])}
    for name, (ours, theirs) in pairs.items():
        error = float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(ours), 1), initial=0))
        if error > TOLERANCE:
            raise ExportError(f"output {name} differs by {error:.1e} between ONNX and PyTorch; allowed: {TOLERANCE}")
