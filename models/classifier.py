"""The composed network: trunk → CAMC → pooling → normalised classifier → MARC → temperature.

B batch, C channels, H W image size, h w map size, K classes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from models import cam
from models.backbones import build_backbone
from models.camc import CAMC
from models.marc import MARC
from models.normalized import CosineHead, LinearHead
from models.preprocessing import Preprocessing


class Explained(NamedTuple):
    """Logits with what is needed to explain them."""

    logits_BK: Tensor
    features_BChw: Tensor
    gain_B1: Tensor


class LongTailClassifier(nn.Module):
    """A network for uint8 images; it normalises them itself, so that training and serving share every step.

    Args:
        classes: number of classes K.
        preprocessing: whose mean and std it applies.
        backbone, weights: see `build_backbone`.
        head: `cosine` (see `CosineHead`) or `linear`.
        scalar, learn_scalar: of the cosine head.
        camc: where CAMC takes its evidence from, or `off`.

    Raises:
        ValueError: if there are fewer than two classes, or an argument of a part is refused by it.
    """

    def __init__(
        self,
        classes: int,
        preprocessing: Preprocessing,
        *,
        backbone: str = "resnet32",
        weights: str | None = None,
        head: Literal["cosine", "linear"] = "cosine",
        scalar: float = 16.0,
        learn_scalar: bool = True,
        camc: Literal["off", "weights", "prototypes"] = "off",
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {classes}")
        self.trunk, width = build_backbone(backbone, weights)
        self.camc = None if camc == "off" else CAMC(width, classes, camc)
        self.head = LinearHead(width, classes) if head == "linear" else CosineHead(width, classes, scalar, learn_scalar)
        self.marc = MARC(classes)
        self.register_buffer("temperature", torch.ones(()))
        self.temperature: Tensor
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).reshape(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def features(self, images_BHWC: Tensor) -> Tensor:
        """The trunk's map F, B×C×h×w, of images with values in 0..255 (uint8 or floating)."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(self.mean.dtype)
        features: Tensor = self.trunk((images_BCHW - self.mean) / self.std)
        return features

    def explain(self, images_BHWC: Tensor, labels_B: Tensor | None = None) -> Explained:
        """Logits, and the reweighted map F' and gain ν that they come from; labels feed CAMC's prototypes."""
        features_BChw = self.features(images_BHWC)
        with torch.autocast(features_BChw.device.type, enabled=False):
            features_BChw = features_BChw.float()
            if self.camc is not None:
                features_BChw = self._reinforce(features_BChw, labels_B)
            pooled_BC = features_BChw.mean(dim=(2, 3))
            return Explained(self.head(pooled_BC), features_BChw, self.head.gain(pooled_BC))

    def _reinforce(self, features_BChw: Tensor, labels_B: Tensor | None) -> Tensor:
        assert self.camc is not None
        expected_BK = self.head(features_BChw.mean(dim=(2, 3))).softmax(dim=1).detach()
        attention_Bhw = self.camc.attention(features_BChw, expected_BK, self.head.weight)
        if self.training and labels_B is not None:
            self.camc.update(features_BChw, attention_Bhw, labels_B)
        return (1 + attention_Bhw.unsqueeze(1)) * features_BChw

    def forward(self, images_BHWC: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Logits z, B×K, before calibration."""
        return self.explain(images_BHWC, labels_B).logits_BK

    def calibrate(self, logits_BK: Tensor) -> Tensor:
        """Calibrated logits z', B×K; the temperature is not in them."""
        calibrated: Tensor = self.marc(logits_BK, self.head.weight_norms())
        return calibrated


class ServedClassifier(nn.Module):
    """What is exported: uint8 images and top_k in, logits, probabilities, top classes and their maps out."""

    def __init__(self, network: LongTailClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, top_k: Tensor) -> tuple[Tensor, ...]:
        """The six outputs in the order of `models.bundle.OUTPUTS`.

        Args:
            images: uint8, B×H×W×3.
            top_k: int64 scalar, 1..K; classes are ranked by calibrated logit.
        """
        network = self.network
        logits_BK, features_BChw, gain_B1 = network.explain(images)
        calibrated_BK = network.calibrate(logits_BK)
        k = cast(int, top_k.item())
        torch._check(k >= 1)
        torch._check(k <= logits_BK.shape[1])
        top_Bk = calibrated_BK.topk(k, dim=1).indices
        weight_BkC = network.head.effective_weight()[top_Bk]
        maps = cam.contributions(features_BChw, gain_B1, weight_BkC, network.head.effective_bias()[top_Bk])
        probabilities_BK = logits_BK.softmax(dim=1)
        calibrated_probabilities_BK = (calibrated_BK / network.temperature).softmax(dim=1)
        return logits_BK, calibrated_BK, probabilities_BK, calibrated_probabilities_BK, top_Bk, maps
