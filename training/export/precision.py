"""Lower precision for serving: fp16 for GPUs and int8 for CPUs, exported only if the answers stay as good.

Only the trunk changes. CAMC, head, margins and maps stay in fp32 and get dequantised features, so that every map still
sums to its logit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from camcal.models.bundle import INPUTS, OUTPUTS, Precision
from camcal.models.classifier import LongTailClassifier
from camcal.models.report import HeldOut
from camcal.training.data import Dataset, Images
from camcal.training.metrics import expected_calibration_error, softmax
from camcal.training.priors import shift_prior

ALLOWED = 0.005  # decrease of accuracy, or increase of ECE, on held-out images; one image if that is more
CALIBRATION_IMAGES = 256
MAP_TOLERANCE = 1e-4


class PrecisionError(ValueError):
    """A precision that would change the answers too much."""


def parse_precision(name: str) -> Precision:
    """The precision called `name`. Raises PrecisionError if there is none."""
    for precision in get_args(Precision):
        if name == precision:
            return precision  # type: ignore[no-any-return]
    raise PrecisionError(f"the precision is {name!r}; expected {', '.join(get_args(Precision))}")


class _HalfTrunk(nn.Module):
    """A trunk in fp16 between two casts."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk.half()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BChw: Tensor = self.trunk(images_BCHW.half())
        return features_BChw.float()


def halve(network: LongTailClassifier) -> LongTailClassifier:
    """A copy whose trunk computes in fp16."""
    network = copy.deepcopy(network).eval().cpu()
    network.trunk = _HalfTrunk(network.trunk)
    return network


class _CalibrationImages(CalibrationDataReader):  # type: ignore[misc]
    """Feeds images one by one, so that every dynamic shape occurs with batch size 1."""

    def __init__(self, images: NDArray[np.uint8]):
        self._feeds: Iterator[dict[str, NDArray[Any]]] = (
            dict(zip(INPUTS, (image[None], np.array(1)), strict=True)) for image in images
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


def quantize(source: Path, target: Path, train: Images) -> None:
    """Write the int8 form of the graph in `source`: QDQ, ranges from training images, one scale per output channel.

    Weights keep 7 bits: without VNNI, products of 8-bit weights saturate, and answers would depend on the processor (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    chosen = np.random.default_rng(0).permutation(len(train))[:CALIBRATION_IMAGES]
    images = np.concatenate(list(_pixels(train.subset(chosen))))
    model = onnx.load(source)
    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_static(
            model,
            target,
            _CalibrationImages(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=_outside_trunk(model),
        )
    finally:
        logging.getLogger().removeFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    """Drops ONNX Runtime's advice to preprocess the model: the exporter has folded constants and inferred shapes."""
    return "pre-process" not in record.getMessage()


def _outside_trunk(model: onnx.ModelProto) -> list[str]:
    """Names of nodes that are neither convolutions nor on a path to one."""
    makers = {name: node for node in model.graph.node for name in node.output}
    waiting = [node for node in model.graph.node if node.op_type == "Conv"]
    inside = {node.name for node in waiting}
    while waiting:
        for name in waiting.pop().input:
            if (maker := makers.get(name)) is not None and maker.name not in inside:
                inside.add(maker.name)
                waiting.append(maker)
    return [node.name for node in model.graph.node if node.name not in inside]


def compare(
    full: Path, smaller: Path, precision: Literal["fp16", "int8"], data: Dataset, prior_temperature: float
) -> dict[str, HeldOut]:
    """Accuracy and ECE of both graphs on the held-out images, which their network must not have been trained on.

    Held-out classes have the training frequencies, so probabilities are for the training prior, with its temperature.

    Raises:
        PrecisionError: if accuracy decreases or ECE increases by more than half a point, or by more than one image if
            the held-out part is too small to show half a point; or if a map does not sum to its logit.
    """
    counts_K = data.train_counts()
    prior_K = counts_K / counts_K.sum()
    before, after = (_held(path, data.holdout, prior_K, prior_temperature) for path in (full, smaller))
    allowed = max(ALLOWED, 1 / len(data.holdout)) + 1e-9
    if before.accuracy - after.accuracy > allowed or after.ece - before.ece > allowed:
        raise PrecisionError(
            f"{precision} would change the answers too much: on {len(data.holdout)} held-out images accuracy goes from "
            f"{before.accuracy:.2%} to {after.accuracy:.2%} and ECE from {before.ece:.2%} to "
            f"{after.ece:.2%}; {allowed:.1%} is allowed for each"
        )
    return {"fp32": before, precision: after}


def _pixels(part: Images) -> Iterator[NDArray[np.uint8]]:
    """All images in order, 32 at a time, as a server batches them."""
    for images_BHWC, _ in part.batches(torch.arange(len(part)).split(32), torch.device("cpu")):
        yield images_BHWC.numpy()


def served(path: Path, part: Images, top_k: int = 1) -> Iterator[dict[str, NDArray[Any]]]:
    """The outputs of a bundle's graph, by name, for each batch of a part of the data."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for images in _pixels(part):
        feed = dict(zip(INPUTS, (images, np.array(top_k)), strict=True))
        yield dict(zip(OUTPUTS, session.run(list(OUTPUTS), feed), strict=True))


def _held(path: Path, part: Images, prior_K: NDArray[np.float64], temperature: float) -> HeldOut:
    rows = []
    for outputs in served(path, part, min(5, len(prior_K))):
        _check_maps(outputs)
        rows.append(outputs["calibrated_logits"])
    probabilities_NK = shift_prior(softmax(np.concatenate(rows) / temperature), prior_K)
    labels_N = part.labels.numpy()
    return HeldOut(
        accuracy=float((probabilities_NK.argmax(axis=1) == labels_N).mean()),
        ece=expected_calibration_error(probabilities_NK, labels_N, np.ones(len(labels_N))),
    )


def _check_maps(outputs: dict[str, NDArray[Any]]) -> None:
    logits_Nk = np.take_along_axis(outputs["logits"], outputs["top_classes"], axis=1)
    error_Nk = np.abs(outputs["maps"].sum(axis=(2, 3)) - logits_Nk) / np.maximum(np.abs(logits_Nk), 1)
    if (worst := float(error_Nk.max())) > MAP_TOLERANCE:
        raise PrecisionError(f"a map's sum differs from its logit by {worst:.1e}; allowed: {MAP_TOLERANCE}")
