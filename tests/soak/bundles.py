"""Bundles to reload: sound ones of another version, and hostile ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from models.bundle import MANIFEST_FILE, MODEL_FILE, sha256

Manifest = dict[str, Any]


def sound(source: Path, folder: Path, version: str) -> Path:
    """A copy of a bundle with another version."""
    return _changed(source, folder, lambda manifest: manifest | {"version": version})


def hostile(source: Path, folder: Path) -> dict[str, Path]:
    """What is wrong → the bundle, one of each kind."""
    kinds: dict[str, Callable[[Path, Path], Path]] = {
        "a model of 0xff": lambda s, f: _with_model(s, f, b"\xff" * 3_000_000),
        "a model that is cut off": lambda s, f: _with_model(s, f, (s / MODEL_FILE).read_bytes()[:10_000]),
        "a graph that never ends": lambda s, f: _with_graph(s, f, _never_ends),
        "answers that are not numbers": lambda s, f: _with_graph(s, f, _not_a_number),
        "another checksum": _another_checksum,
        "a class too many": lambda s, f: _changed(s, f, _class_too_many),
        "a manifest 100,000 lists deep": lambda s, f: _with_manifest(s, f, b"[" * 100_000),
        "a manifest of a gigabyte": _gigabyte,
        "a manifest that is a FIFO": _fifo,
        "no manifest": lambda s, f: _without_manifest(s, f),
    }
    return {what: make(source, folder / what.replace(" ", "-")) for what, make in kinds.items()}


def _changed(source: Path, folder: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """A copy whose manifest is changed."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    (folder / MANIFEST_FILE).write_text(json.dumps(change(manifest)))
    return folder


def _with_model(source: Path, folder: Path, model: bytes) -> Path:
    """A copy with another model, whose checksum is right."""
    shutil.copytree(source, folder)
    (folder / MODEL_FILE).write_bytes(model)
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    manifest["files"][MODEL_FILE] = sha256(folder / MODEL_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"version": "hostile"}))
    return folder


def _with_graph(source: Path, folder: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    model = onnx.load(source / MODEL_FILE)
    change(model.graph)
    return _with_model(source, folder, model.SerializeToString())


def _never_ends(graph: onnx.GraphProto) -> None:
    """A loop of 2⁶² turns between the input `top_k` and those who read it."""
    for node in graph.node:
        node.input[:] = ["top_k_late" if name == "top_k" else name for name in node.input]
    real, flag = TensorProto.INT64, TensorProto.BOOL
    inputs = [helper.make_tensor_value_info(n, t, []) for n, t in (("turn", real), ("go", flag), ("sum", real))]
    outputs = [helper.make_tensor_value_info(n, t, []) for n, t in (("go_on", flag), ("next_sum", real))]
    nodes = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Sub", ["turn", "sum"], ["next_sum"])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    graph.initializer.append(helper.make_tensor("turns", real, [], [2**62]))
    graph.initializer.append(helper.make_tensor("always", flag, [], [True]))
    graph.node.insert(0, helper.make_node("Loop", ["turns", "always", "top_k"], ["top_k_late"], body=body))


def _not_a_number(graph: onnx.GraphProto) -> None:
    """Calibrated probabilities plus NaN."""
    name = "calibrated_probabilities"
    for node in graph.node:
        node.output[:] = ["right" if output == name else output for output in node.output]
        node.input[:] = ["right" if given == name else given for given in node.input]
    graph.initializer.append(helper.make_tensor("nan", TensorProto.FLOAT, [], [float("nan")]))
    graph.node.append(helper.make_node("Add", ["right", "nan"], [name]))


def _class_too_many(manifest: Manifest) -> Manifest:
    """One more class than the model knows, everywhere in the manifest."""
    calibration = manifest["calibration"]
    longer = {name: calibration[name] + [1.0] for name in ("omega", "beta", "weight_norms")}
    extra = {"name": "one too many", "train_count": 1, "group": "few"}
    return manifest | {"classes": manifest["classes"] + [extra], "calibration": calibration | longer, "prior": None}


def _another_checksum(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    with (folder / MODEL_FILE).open("ab") as file:
        file.write(b"x")
    return folder


def _with_manifest(source: Path, folder: Path, manifest: bytes) -> Path:
    shutil.copytree(source, folder)
    (folder / MANIFEST_FILE).write_bytes(manifest)
    return folder


def _gigabyte(source: Path, folder: Path) -> Path:
    """Sparse: it takes no room on the disk."""
    shutil.copytree(source, folder)
    os.truncate(folder / MANIFEST_FILE, 10**9)
    return folder


def _without_manifest(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    (folder / MANIFEST_FILE).unlink()
    return folder


def _fifo(source: Path, folder: Path) -> Path:
    os.mkfifo(_without_manifest(source, folder) / MANIFEST_FILE)
    return folder
