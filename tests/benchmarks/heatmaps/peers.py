"""pytorch-grad-cam's methods on camcal's network, with its own settings: maps of the trunk's output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from camcal.models.classifier import LongTailClassifier
from tests.benchmarks.heatmaps.localisation import Maps, unit_range

BATCH = 5  # Score-CAM holds 256 images for each


class ChannelsFirst(nn.Module):
    """The network in the form that the peers expect: normalised images B×3×S×S in, plain logits B×K out."""

    def __init__(self, network: LongTailClassifier) -> None:
        super().__init__()
        self.network = network.eval()

    def normalised(self, images: NDArray[np.uint8]) -> Tensor:
        """Images N×S×S×3 as this network takes them."""
        images_NCHW = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.network.mean.dtype)
        return (images_NCHW - self.network.mean) / self.network.std

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels_BCHW = images_BCHW * self.network.std + self.network.mean
        logits_BK: Tensor = self.network(pixels_BCHW.permute(0, 2, 3, 1))
        return logits_BK


class CAM(BaseCAM):  # type: ignore[misc]
    """Class activation maps (Zhou et al., arXiv 1512.04150), which the package lacks: channels weighted by W_k."""

    def __init__(self, model: ChannelsFirst, target_layers: list[nn.Module]) -> None:
        super().__init__(model, target_layers, uses_gradients=False)

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: nn.Module, targets: list[Any], activations: Any, grads: Any
    ) -> NDArray[np.float32]:
        weight_KC, _ = self.model.network.rows()
        chosen: NDArray[np.float32] = weight_KC[[target.category for target in targets]].detach().numpy()
        return chosen


PEERS: dict[str, Callable[..., Any]] = {
    "cam": CAM,
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "layercam": LayerCAM,
    "eigencam": EigenCAM,
    "scorecam": ScoreCAM,
}


class Peer:
    """One of `PEERS` on a copy of a network, whose trunk gets its hooks."""

    def __init__(self, name: str, network: LongTailClassifier) -> None:
        self._model = ChannelsFirst(copy.deepcopy(network))
        self._method = PEERS[name](self._model, [self._model.network.trunk])

    def __call__(self, images: NDArray[np.uint8], classes_P: NDArray[np.int64]) -> Maps:
        """Maps in [0, 1], P×S×S, of one class of each image, P×S×S×3."""
        found = []
        for start in range(0, len(images), BATCH):
            targets = [ClassifierOutputTarget(int(label)) for label in classes_P[start : start + BATCH]]
            found.append(self._method(self._model.normalised(images[start : start + BATCH]), targets))
        return unit_range(np.concatenate(found))
