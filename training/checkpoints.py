"""Networks in files: checkpoints while training, calibrated networks after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from camcal.models.classifier import LongTailClassifier
from camcal.models.lora import add_lora, merge_lora
from camcal.models.preprocessing import Preprocessing
from camcal.training.data import Dataset
from camcal.training.data.sources import preprocessing_of
from camcal.training.recipe import Recipe, RecipeError, parse_recipe
from camcal.training.run import RunError, RunFolder

NETWORK = "network."
EMA = "ema."
"""Prefixes of a network's tensors in a file: its weights, and in checkpoints their moving average."""


class Trained(NamedTuple):
    """A network from a file, its recipe, and the rest of the file's metadata."""

    network: LongTailClassifier
    recipe: Recipe
    meta: dict[str, Any]


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors with JSON metadata; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, partial, metadata={"camcal": json.dumps(meta)})
    os.replace(partial, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        RunError: if the file is missing or is not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["camcal"])
            return {name: file.get_tensor(name) for name in file.keys()}, meta
    except FileNotFoundError:
        raise RunError(f"{path} is missing: has `camcal train` finished in {path.parent}?") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} is not a camcal checkpoint, or is damaged ({error}): delete it and train again, or name another "
            "folder"
        ) from None


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def build_network(recipe: Recipe, classes: int, preprocessing: Preprocessing | None = None) -> LongTailClassifier:
    """The untrained network of a recipe, seeded by it.

    Raises:
        ValueError: if a part refuses its setting.
    """
    torch.manual_seed(recipe.training_seed)
    return LongTailClassifier(classes, preprocessing or preprocessing_of(recipe.data), **recipe.model.model_dump())


def network_tensors(network: LongTailClassifier, prefix: str = NETWORK) -> dict[str, Tensor]:
    """The state of a network under the names it has in a file."""
    return {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}


def load_network(path: Path) -> Trained:
    """A network from `checkpoint.safetensors` or `network.safetensors`, its recipe, and the rest of the metadata.

    With `fit.ema`, the average of the weights; with `fit.lora`, layers with the adapted weights.

    Raises:
        RunError: if the file is missing or damaged, or does not fit the network.
    """
    tensors, meta = load_tensors(path)
    try:
        recipe = parse_recipe(meta["recipe"], path.name)
        # What was trained replaces the pretrained weights, which need not be fetched again.
        blank = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
        network = build_network(blank, len(meta["classes"]))
        if any(".parametrizations." in name for name in tensors):
            add_lora(network.trunk, recipe.fit.lora)
        restore(network, tensors, EMA if any(name.startswith(EMA) for name in tensors) else NETWORK)
        merge_lora(network.trunk)
    except (KeyError, RuntimeError, RecipeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} does not fit this version of camcal: {reason}") from None
    network.views = recipe.calibrate.views
    return Trained(network.eval(), recipe, meta)


def load_finished(folder: RunFolder) -> Trained:
    """Network, recipe and metadata of a run's training, before calibration. Raises RunError if it is not finished."""
    network, recipe, meta = load_network(folder.checkpoint)
    if meta["epoch"] < recipe.fit.epochs:
        raise RunError(
            f"{folder.path} has {meta['epoch']} of {recipe.fit.epochs} epochs: finish it with `camcal train` first"
        )
    return Trained(network, recipe, meta)


def is_trained(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether the folder holds a network trained for all epochs of a recipe."""
    return folder.checkpoint.is_file() and bool(load_tensors(folder.checkpoint)[1]["epoch"] >= recipe.fit.epochs)


def restore(network: LongTailClassifier, tensors: dict[str, Tensor], prefix: str = NETWORK) -> None:
    """Copy the tensors whose names begin with a prefix into a network."""
    names = [name for name in tensors if name.startswith(prefix)]
    network.load_state_dict({name.removeprefix(prefix): tensors[name] for name in names})


def data_meta(data: Dataset) -> dict[str, Any]:
    """The metadata of a checkpoint about its data."""
    return {
        "classes": data.classes,
        "train_counts": data.train_counts().tolist(),
        "data": data.digest,
        "pixels": data.pixels,
    }


def check_data(folder: RunFolder, meta: dict[str, Any], data: Dataset) -> None:
    """Raises RunError unless `data` is what the run with this metadata was trained on.

    Held-out and test images are drawn from all images: if those have changed, some that were trained on could be among
    them.
    """
    if any(meta.get(name) != value for name, value in data_meta(data).items()):
        raise RunError(
            f"{folder.path} was trained on other images than the data has now: restore them, or train again with "
            "another --out"
        )
