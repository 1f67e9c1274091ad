"""From a calibrated network to a bundle: one ONNX graph, checked against PyTorch before it is let out."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from camcal.models import answers
from camcal.models.bundle import (
    INPUTS,
    MANIFEST_FILE,
    MODEL_FILE,
    OUTPUTS,
    REPORT_FILE,
    Bundle,
    BundleError,
    Calibration,
    ClassInfo,
    Manifest,
    Precision,
    group_of,
    sha256,
    write_bundle,
)
from camcal.models.canary import CANARY_FILE, Canary
from camcal.models.classifier import LongTailClassifier, ServedClassifier, can_fold, fold_branches
from camcal.training.config import Recipe
from camcal.training.data import Dataset
from camcal.training.data.sources import preprocessing_of
from camcal.training.precision import PrecisionError, compare, halve, quantize
from camcal.training.priors import given_prior
from camcal.training.run import save_json

TOLERANCE = 1e-4
MAX_BATCH = 65535


class ExportError(ValueError):
    """A graph that does not compute what the network computes."""


def export_onnx(network: LongTailClassifier, size: int, path: Path) -> None:
    """Write the serving graph of a network for images of size×size, and check it against PyTorch.

    Raises:
        ExportError: if ONNX Runtime's outputs differ from PyTorch's by more than 1e-4, relative to values above one.
    """
    examples = _write_onnx(network, size, path)
    served = ServedClassifier(network)
    for count, top_k in ((3, 2), (1, network.marc.omega.numel())):
        _check_parity(served, path, examples[:count], top_k)


def _write_onnx(network: LongTailClassifier, size: int, path: Path) -> torch.Tensor:
    """Write the graph, and return images to try it with."""
    served = ServedClassifier(network.eval().cpu()).eval()
    examples = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter warns of its own dependencies' deprecations; what it writes is checked below.
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
    _strip(model)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return examples


def _write_smaller(
    network: LongTailClassifier, size: int, path: Path, precision: Literal["fp16", "int8"], data: Dataset
) -> Path:
    """Replace the fp32 graph of `network` at `path` by a smaller one; return where the fp32 one is then."""
    full = path.replace(path.with_name("full.onnx"))
    if precision == "fp16":
        _write_onnx(halve(network), size, path)
    else:
        quantize(full, path, data.train)
        model = onnx.load(path)
        _strip(model)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())
    return full


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes about its source: stack traces with this machine's paths, and names of modules."""
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


def _check_parity(served: ServedClassifier, path: Path, images: torch.Tensor, top_k: int) -> None:
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
    # Of thousands of classes, some are so near to each other that rounding decides their order: the classes at a place
    # must have the same logit, and their maps are compared where they are the same class.
    places = pairs["top_classes"]
    same_Nk = places[0] == places[1]
    calibrated_NK = pairs["calibrated_logits"][0]
    ours_Nk, theirs_Nk = (np.take_along_axis(calibrated_NK, classes, axis=1) for classes in places)
    pairs |= {"top_classes": (ours_Nk, theirs_Nk), "maps": tuple(maps[same_Nk] for maps in pairs["maps"])}
    for name, (ours, theirs) in pairs.items():
        error = float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(ours), 1), initial=0))
        if error > TOLERANCE:
            raise ExportError(f"output {name} differs by {error:.1e} between ONNX and PyTorch; allowed: {TOLERANCE}")


def _check_replaceable(folder: Path) -> None:
    """Raises ExportError unless the folder is missing or empty, or holds a bundle and nothing else."""
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = there - {MANIFEST_FILE, MODEL_FILE, REPORT_FILE, CANARY_FILE}
    if foreign or (there and MANIFEST_FILE not in there):
        other = min(foreign or there)
        raise ExportError(f"{folder} holds {other}, which is no part of a bundle of ours; choose another folder")


def _record(graph: Path, manifest: Manifest) -> Canary:
    """What the graph answers here on images that need no file, for services to compare.

    Raises:
        ExportError: if it is nothing that a service would give.
    """
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8], top_k: int) -> answers.Answers:
        found = session.run(list(OUTPUTS), dict(zip(INPUTS, (images, np.array(top_k)), strict=True)))
        return dict(zip(OUTPUTS, found, strict=True))

    try:
        return answers.record(run, manifest)
    except BundleError as error:
        raise ExportError(str(error)) from None


def _folded(network: LongTailClassifier) -> LongTailClassifier:
    return fold_branches(network) if can_fold(network) else network


@torch.no_grad()
def export_bundle(
    network: LongTailClassifier,
    recipe: Recipe,
    classes: list[str],
    train_counts: list[int],
    report: dict[str, Any],
    folder: Path,
    precision: Precision = "fp32",
    data: Dataset | None = None,
    judged: LongTailClassifier | None = None,
) -> Bundle:
    """Write a bundle into `folder`, replacing a bundle that is there, and return it verified.

    Args:
        precision: of the trunk; see `camcal.training.precision`.
        data: of the run, needed for a precision other than fp32.
        judged: the network by whose answers such a precision is judged, where `network` has seen the held-out images;
            the report gets the figures.

    Raises:
        PrecisionError: if the smaller precision changes the answers too much.
        ExportError: if the graph does not agree with PyTorch, or `folder` holds something that is not a bundle.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    prior_temperatures = report["calibration"]["prior_temperatures"]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    preprocessing = preprocessing_of(recipe.data)
    size = preprocessing.input_size
    network = _folded(network)
    graph = partial / MODEL_FILE
    export_onnx(network, size, graph)
    if precision != "fp32":
        assert data is not None
        full = _write_smaller(network, size, graph, precision, data)
        with TemporaryDirectory() as elsewhere:
            pair = full, graph
            if judged is not None:
                other = Path(elsewhere) / MODEL_FILE
                judged = _folded(judged)
                export_onnx(judged, size, other)
                pair = _write_smaller(judged, size, other, precision, data), other
            try:
                report = report | {"held_out": compare(*pair, precision, data, prior_temperatures["train"])}
            except PrecisionError:
                shutil.rmtree(partial)
                raise
        full.unlink()
    save_json(partial / REPORT_FILE, report)
    grid = network.features(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape[2:]
    files = {name: sha256(partial / name) for name in (MODEL_FILE, REPORT_FILE)}
    manifest = Manifest(
        schema_version=1,
        name=recipe.name,
        version=files[MODEL_FILE][:12],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        classes=[
            ClassInfo(name=name, train_count=count, group=group_of(count))
            for name, count in zip(classes, train_counts, strict=True)
        ],
        preprocessing=preprocessing,
        calibration=Calibration(
            scalar=network.scalar,
            omega=network.marc.omega.tolist(),
            beta=network.marc.beta.tolist(),
            weight_norms=network.weight_norms().tolist(),
            temperature=float(network.temperature),
            prior_temperatures=prior_temperatures,
        ),
        grid=(grid[0], grid[1]),
        map_shift=round(float(network.map_shift), 2),
        precision=precision,
        figures={step: report["test"][step] for step in ("trained", "calibrated")},
        recipe=recipe.shown(),
        prior=None if recipe.calibrate.prior is None else given_prior(recipe.calibrate.prior, classes).tolist(),
        files=files,
    )
    write_bundle(partial, manifest, _record(graph, manifest))
    Bundle.load(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return Bundle.load(folder)
