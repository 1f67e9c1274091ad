"""The logits of a trained network, cached in a file for the next calibration. N samples, K classes."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from camcal.models.classifier import LongTailClassifier
from camcal.training.checkpoints import load_tensors, save_tensors
from camcal.training.data import Dataset, Images, LabelledImages
from camcal.training.data.augment import Augment
from camcal.training.data.features import LabelledMaps
from camcal.training.provenance import code_digest
from camcal.training.recipe import Recipe
from camcal.training.run import RunError

PIXELS = 256 * 224**2  # at most, per batch
KEPT = 2**26  # values at most in the file, 256 MiB

FOUND_LATER = ("rescale.", "marc.", "temperature", "map_shift")
"""The parts of a network's state that are fitted after training and do not change z°."""


@torch.no_grad()
def predict_logits(
    network: LongTailClassifier,
    part: Images,
    augment: Augment | None = None,
    *,
    trained: bool = False,
) -> Tensor:
    """Logits z, or z° as trained, N×K in fp32 on the CPU, of a part of the data; the network's mode is not changed.

    With cached maps of both views, `augment` changes nothing: there is nothing else to draw.
    """
    batch_size = max(1, min(256, PIXELS // part.side**2))
    indices = torch.arange(len(part)).split(batch_size) if len(part) else ()
    logits_NK = torch.empty(len(part), len(network.rescale.scale))  # filled in place: it may be most of the memory
    for index_B, logits_BK in zip(indices, _logits(network, part, indices, augment), strict=True):
        logits_NK[index_B] = (network.rescale.undo(logits_BK) if trained else logits_BK).cpu()
    return logits_NK


def _logits(
    network: LongTailClassifier, part: Images, indices: Sequence[Tensor], augment: Augment | None
) -> Iterator[Tensor]:
    """z of each batch, B×K in fp32. Cached features come as maps."""
    device = network.mean.device
    if isinstance(part, LabelledMaps) and network.views == "flip":
        for both in part.pairs(indices, device):
            yield torch.stack([network.logits_of_maps(maps_BChw).float() for maps_BChw in both]).mean(dim=0)
        return
    forward = network.logits_of_maps if isinstance(part, LabelledMaps) else network
    for images_BHWC, _ in part.batches(indices, device, augment):
        yield forward(images_BHWC).float()


class TrainedLogits:
    """z° of the parts of a data set, independent of any calibration, read from a file if computed before.

    A digest of code, weights, images and augmentation tells whether the file still applies. Logits of images that are
    decoded on the fly are not cached, nor more than `KEPT` values.

    Args:
        network: in evaluation mode.
        path: the file; None for no cache.

    Attributes:
        seconds: spent computing logits.
    """

    def __init__(self, network: LongTailClassifier, path: Path | None = None) -> None:
        self.network, self.path = network, path
        self.seconds = 0.0
        self._kept: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}
        if path is not None and path.is_file():
            try:
                self._kept, self._keys = load_tensors(path)
            except RunError:
                pass  # damaged: compute them again

    def holdout(self, data: Dataset) -> Tensor:
        """N×K."""
        return self._of("holdout", data.holdout)

    def test(self, data: Dataset) -> Tensor:
        """N×K."""
        return self._of("test", data.test)

    def train(self, data: Dataset, recipe: Recipe) -> Tensor:
        """Of augmented images, with one block of rows per pass (`calibrate.passes`)."""
        return self._of("train", data.train, recipe)

    def _of(self, name: str, part: Images, augmented: Recipe | None = None) -> Tensor:
        key = self._key(part, augmented)
        if self._keys.get(name) == key:
            return self._kept[name]
        began = time.perf_counter()
        if augmented is None:
            logits_NK = predict_logits(self.network, part, trained=True)
        else:
            generator = torch.Generator(self.network.mean.device).manual_seed(augmented.seed)
            augment = Augment(augmented.augment, generator)
            passes = [
                predict_logits(self.network, part, augment, trained=True) for _ in range(augmented.calibrate.passes)
            ]
            logits_NK = torch.cat(passes) if len(passes) > 1 else passes[0]
        self.seconds += time.perf_counter() - began
        self._keep(name, key, logits_NK, part)
        return logits_NK

    def _keep(self, name: str, key: str, logits_NK: Tensor, part: Images) -> None:
        others = sum(kept.numel() for other, kept in self._kept.items() if other != name)
        if self.path is None or not isinstance(part, LabelledImages) or others + logits_NK.numel() > KEPT:
            return
        self._kept[name], self._keys[name] = logits_NK, key
        save_tensors(self.path, self._kept, self._keys)

    def _key(self, part: Images, augmented: Recipe | None) -> str:
        """Digest of everything that determines the logits; empty if they are not cached."""
        if self.path is None or not isinstance(part, LabelledImages):
            return ""
        network = self.network
        kind = f"{type(part).__name__} {network.views}"
        found = hashlib.sha256(f"{code_digest()} {kind} {torch.__version__} {network.mean.device.type}".encode())
        trained = (tensor for name, tensor in network.state_dict().items() if not name.startswith(FOUND_LATER))
        for tensor in itertools.chain(trained, (network.mean, network.std), (part.images,)):
            found.update(tensor.detach().cpu().contiguous().numpy().data)
        if augmented is not None:
            settings = augmented.augment.model_dump(mode="json")
            found.update(json.dumps([settings, augmented.seed, augmented.calibrate.passes]).encode())
        return found.hexdigest()[:16]
