"""From a calibrated network to a bundle."""

from __future__ import annotations

import datetime
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

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
from camcal.models.classifier import LongTailClassifier, can_fold, fold_branches
from camcal.models.report import FittedCalibration, HeldOut, Report
from camcal.training.checkpoints import Trained, save_json
from camcal.training.data import Dataset
from camcal.training.data.sources import preprocessing_of
from camcal.training.export.graph import ExportError, export_onnx, strip, write_graph
from camcal.training.export.precision import PrecisionError, compare, halve, quantize
from camcal.training.fitting.learned_prior import plain_prior
from camcal.training.priors import given_prior


def _write_smaller(network: LongTailClassifier, path: Path, smaller: Smaller) -> Path:
    """Replace the fp32 graph of `network` at `path` by a smaller one; return where the fp32 one is then."""
    full = path.replace(path.with_name("full.onnx"))
    if smaller.precision == "fp16":
        write_graph(halve(network), smaller.data.preprocessing.input_size, path)
    else:
        quantize(full, path, smaller.data.train)
        model = onnx.load(path)
        strip(model)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())
    return full


def _check_replaceable(folder: Path) -> None:
    """Raises ExportError unless the folder is missing or empty, or holds a bundle and nothing else."""
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = there - {MANIFEST_FILE, MODEL_FILE, REPORT_FILE, CANARY_FILE}
    if foreign or (there and MANIFEST_FILE not in there):
        other = min(foreign or there)
        raise ExportError(f"{folder} holds {other}, which is not part of a bundle: choose another folder")


def _record(graph: Path, manifest: Manifest) -> Canary:
    """The graph's answers on generated images, which services compare with their own.

    Raises:
        ExportError: if they are not valid answers.
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


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """A precision below fp32, and what its answers are compared on.

    precision: of the trunk; see `camcal.training.export.precision`.
    data: of the run.
    judged: the network whose answers on held-out images are compared, where the exported one was trained on them.
    """

    precision: Literal["fp16", "int8"]
    data: Dataset
    judged: LongTailClassifier | None = None


@torch.no_grad()
def export_bundle(trained: Trained, report: Report, folder: Path, smaller: Smaller | None = None) -> Bundle:
    """Write a bundle into `folder`, replacing a bundle that is there, and return it verified.

    Args:
        trained: the calibrated network.
        smaller: the precision, if not fp32; the report in the bundle gets the figures of the comparison.

    Raises:
        PrecisionError: if the smaller precision changes the answers too much.
        ExportError: if the graph does not agree with PyTorch, or `folder` holds something that is not a bundle.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    network, partial = _folded(trained.network), folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    graph = partial / MODEL_FILE
    export_onnx(network, trained.recipe.data.input_size, graph)
    if smaller is not None:
        try:
            report = report.model_copy(update={"held_out": _shrink(network, graph, smaller, report.calibration)})
        except PrecisionError:
            shutil.rmtree(partial)
            raise
    save_json(partial / REPORT_FILE, report.to_json())
    files = {name: sha256(partial / name) for name in (MODEL_FILE, REPORT_FILE)}
    manifest = _manifest(trained, network, report, files, "fp32" if smaller is None else smaller.precision)
    write_bundle(partial, manifest, _record(graph, manifest))
    Bundle.load(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return Bundle.load(folder)


def _shrink(
    network: LongTailClassifier, graph: Path, smaller: Smaller, calibration: FittedCalibration
) -> dict[str, HeldOut]:
    """Replace the fp32 graph of a network by a smaller one; returns how both do on held-out images.

    Raises:
        PrecisionError: if the smaller precision changes the answers too much.
    """
    full = _write_smaller(network, graph, smaller)
    with TemporaryDirectory() as elsewhere:
        pair = full, graph
        if smaller.judged is not None:
            other, judged = Path(elsewhere) / MODEL_FILE, _folded(smaller.judged)
            export_onnx(judged, smaller.data.preprocessing.input_size, other)
            pair = _write_smaller(judged, other, smaller), other
        found = compare(*pair, smaller.precision, smaller.data, calibration.prior_temperatures["train"])
    full.unlink()
    return found


def _manifest(
    trained: Trained, network: LongTailClassifier, report: Report, files: dict[str, str], precision: Precision
) -> Manifest:
    recipe, classes = trained.recipe, trained.meta["classes"]
    preprocessing = preprocessing_of(recipe.data)
    size = preprocessing.input_size
    height, width = network.features(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape[2:]
    return Manifest(
        schema_version=1,
        name=recipe.name,
        version=files[MODEL_FILE][:12],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        classes=[
            ClassInfo(name=name, train_count=count, group=group_of(count))
            for name, count in zip(classes, trained.meta["train_counts"], strict=True)
        ],
        preprocessing=preprocessing,
        calibration=Calibration(
            scalar=network.scalar,
            omega=network.marc.omega.tolist(),
            beta=network.marc.beta.tolist(),
            weight_norms=network.weight_norms().tolist(),
            temperature=float(network.temperature),
            probability_prior=plain_prior(recipe, np.array(trained.meta["train_counts"])),
            prior_temperatures=report.calibration.prior_temperatures,
        ),
        grid=(height, width),
        map_shift=round(float(network.map_shift), 2),
        views=network.views,
        precision=precision,
        figures={step: report.test[step].model_dump() for step in ("trained", "calibrated")},
        recipe=recipe.shown(),
        prior=None if recipe.calibrate.prior is None else given_prior(recipe.calibrate.prior, classes).tolist(),
        files=files,
    )
