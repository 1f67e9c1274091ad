"""Hostile or broken bundles, each derived from a good one.

`HOSTILE` maps names to functions and the expected error messages. Those in `ENDLESS` take all of
`CAMCAL_LOAD_TIMEOUT_S`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from camcal.models.bundle import MANIFEST_FILE, MAX_CLASSES, MODEL_FILE, REPORT_FILE, sha256

Spoil = Callable[[Path], None]  # changes a copy of a good bundle


def make(good: Path, folder: Path, spoil: Spoil) -> Path:
    """Copy the bundle `good` to `folder` and spoil it."""
    shutil.copytree(good, folder)
    spoil(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    change(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def reseal(folder: Path) -> None:
    """Update the checksums in the manifest, and drop the canary."""
    files = {name: sha256(folder / name) for name in (MODEL_FILE, REPORT_FILE)}
    edit(folder, lambda manifest: manifest.update(files=files))


def change_output(folder: Path, output: str, *nodes: onnx.NodeProto, **constants: np.ndarray[Any, Any]) -> None:
    """Insert `nodes` before an output: they read the previous output as `plain`, and `constants`, and write it."""
    model = onnx.load(folder / MODEL_FILE)
    for node in model.graph.node:
        node.input[:] = ["plain" if name == output else name for name in node.input]
        node.output[:] = ["plain" if name == output else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend(nodes)
    onnx.save(model, folder / MODEL_FILE)
    reseal(folder)


def endless_graph(folder: Path) -> None:
    truth, number = helper.make_tensor_value_info, TensorProto.FLOAT
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Identity", ["sum"], ["summed"])],
        "body",
        [truth("turn", TensorProto.INT64, []), truth("go", TensorProto.BOOL, []), truth("sum", number, [])],
        [truth("goes", TensorProto.BOOL, []), truth("summed", number, [])],
    )
    change_output(
        folder,
        "logits",
        helper.make_node("Loop", ["", "true", "zero"], ["spun"], body=body),
        helper.make_node("Add", ["plain", "spun"], ["logits"]),
        true=np.array(True),
        zero=np.array(0, dtype=np.float32),
    )


def very_many_fields(folder: Path) -> None:
    (folder / MODEL_FILE).write_bytes(b"\x08\x00" * 60_000_000)
    reseal(folder)


def too_much_memory(folder: Path) -> None:
    change_output(
        folder,
        "logits",
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),  # of zeros
        helper.make_node("ReduceSum", ["huge"], ["nothing"], keepdims=0),
        helper.make_node("Cast", ["top_k"], ["k"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["nothing", "k"], ["none"]),
        helper.make_node("Add", ["plain", "none"], ["logits"]),
        shape=np.array([2**17, 2**17], dtype=np.int64),
    )


def not_finite(folder: Path) -> None:
    change_output(
        folder, "logits", helper.make_node("Add", ["plain", "nan"], ["logits"]), nan=np.array(np.nan, np.float32)
    )


def no_such_class(folder: Path) -> None:
    change_output(
        folder, "top_classes", helper.make_node("Add", ["plain", "far"], ["top_classes"]), far=np.array(10**6)
    )


def one_class_twice(folder: Path) -> None:
    change_output(folder, "top_classes", helper.make_node("Mul", ["plain", "none"], ["top_classes"]), none=np.array(0))


def other_maps(folder: Path) -> None:
    change_output(
        folder, "maps", helper.make_node("Mul", ["plain", "two"], ["maps"]), two=np.array(1.01, dtype=np.float32)
    )


def other_answers(folder: Path) -> None:
    """Valid outputs that differ from those of the bundle's canary."""
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    model = onnx.load(folder / MODEL_FILE)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 4 and values.size > 1000:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[:, ::-1]), tensor.name))
    onnx.save(model, folder / MODEL_FILE)
    edit(folder, lambda manifest: manifest.update(files=files | {MODEL_FILE: sha256(folder / MODEL_FILE)}))


def white_is_not_finite(folder: Path) -> None:
    """Passes every check at load, but has NaN outputs for a white image."""
    change_output(
        folder,
        "logits",
        helper.make_node("Cast", ["images"], ["whole"], to=TensorProto.INT32),
        helper.make_node("ReduceMin", ["whole", "sides"], ["darkest"], keepdims=0),
        helper.make_node("Unsqueeze", ["darkest", "last"], ["column"]),
        helper.make_node("Equal", ["column", "white"], ["is_white"]),
        helper.make_node("Where", ["is_white", "nan", "plain"], ["logits"]),
        sides=np.array([1, 2, 3]),
        last=np.array([1]),
        white=np.array(255, dtype=np.int32),
        nan=np.array(np.nan, dtype=np.float32),
    )


def all_ones(folder: Path) -> None:
    (folder / MODEL_FILE).write_bytes(b"\xff" * 3_000_000)
    reseal(folder)


def pipe(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    os.mkfifo(folder / MANIFEST_FILE)


def pipe_for_a_model(folder: Path) -> None:
    (folder / MODEL_FILE).unlink()
    os.mkfifo(folder / MODEL_FILE)


def deep_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_bytes(b'{"a":' + b"[" * 10_000_000)


def huge_deep_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_bytes(b"[" * 100_000_000)


def gigabytes(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(5 * 2**30)  # sparse: takes no disk space

    return spoil


def very_many_classes(folder: Path) -> None:
    classes = [{"name": f"c{k}", "train_count": 1, "group": "few"} for k in range(MAX_CLASSES + 1)]
    edit(folder, lambda manifest: manifest.update(classes=classes))


def forged_line(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["classes"][0].update(name="a\x1b[2J\nERROR: all is lost"))


def absurd_calibration(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["calibration"].update(temperature=1e-310))


def changed_byte(folder: Path) -> None:
    data = bytearray((folder / MODEL_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / MODEL_FILE).write_bytes(data)


def link_out(folder: Path) -> None:
    outside = folder.with_name(folder.name + ".onnx")
    shutil.move(folder / MODEL_FILE, outside)
    (folder / MODEL_FILE).symlink_to(outside)


def weights_outside(folder: Path) -> None:
    model = onnx.load(folder / MODEL_FILE)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    onnx.external_data_helper.set_external_data(tensor, "../../../etc/passwd")
    tensor.ClearField("raw_data")
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    reseal(folder)


def deep_report(folder: Path) -> None:
    (folder / REPORT_FILE).write_bytes(b'{"a":' + b"[" * 10_000_000)
    reseal(folder)


def other_report(folder: Path) -> None:
    """Valid JSON, but not the documented structure."""
    report = json.loads((folder / REPORT_FILE).read_text())
    report["reliability"] = {"trained": [{"low": "\ud800"}]}
    (folder / REPORT_FILE).write_text(json.dumps(report))
    reseal(folder)


ENDLESS: dict[str, tuple[Spoil, str]] = {
    "endless-graph": (
        endless_graph,
        r"loading and testing the bundle took more than [\d.]+ s \(CAMCAL_LOAD_TIMEOUT_S\)",
    ),
    "very-many-fields": (very_many_fields, "loading and testing the bundle took|not a readable ONNX file"),
}
HOSTILE: dict[str, tuple[Spoil, str]] = ENDLESS | {
    "too-much-memory": (too_much_memory, "the memory limit is .* bytes .CAMCAL_LOAD_BYTES"),
    "not-finite": (not_finite, "logits is not finite"),
    "no-such-class": (no_such_class, "top_classes holds a class that does not exist"),
    "one-class-twice": (one_class_twice, "top_classes names one class twice"),
    "other-maps": (other_maps, "the sum of a map and its logit differ by"),
    "other-answers": (other_answers, "does not answer as it did when the bundle was made: logits differ by"),
    "all-ones": (all_ones, "not a readable ONNX file"),
    "pipe": (pipe, "manifest.json is a pipe"),
    "pipe-for-a-model": (pipe_for_a_model, "model.onnx is a pipe"),
    "deep-manifest": (deep_manifest, "nested"),
    "huge-deep-manifest": (huge_deep_manifest, "manifest.json has 100000000 bytes; the limit is"),
    "huge-manifest": (gigabytes(MANIFEST_FILE), "manifest.json has 5368709120 bytes; the limit is"),
    "huge-report": (gigabytes(REPORT_FILE), "report.json has 5368709120 bytes; the limit is"),
    "huge-model": (gigabytes(MODEL_FILE), "model.onnx has 5368709120 bytes; the limit is"),
    "very-many-classes": (very_many_classes, "classes: .* at most 65536 items"),
    "forged-line": (forged_line, r"the character U\+001B is not allowed"),
    "absurd-calibration": (absurd_calibration, "calibration.temperature"),
    "changed-byte": (changed_byte, "was changed: its sha256 is"),
    "link-out": (link_out, "model.onnx is a link out of its folder"),
    "weights-outside": (weights_outside, "reads weights from '../../../etc/passwd', which the manifest does not list"),
    "other-report": (other_report, "report.json: reliability.trained.0.low: "),
    "deep-report": (deep_report, "nested"),
}
