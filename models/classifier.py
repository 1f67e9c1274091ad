"""The composed network: trunk → branches → CAMC → pooling → head → rescaling → MARC → temperature.

B batch, R branches (one without ResLT), C channels, H W image size, h w map size, K classes.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from camcal.models import cam
from camcal.models.backbones import build_backbone
from camcal.models.bundle import Views
from camcal.models.camc import CAMC, Attention, TaughtAttention
from camcal.models.marc import MARC
from camcal.models.normalized import Head, LinearHead, Rescale, build_head
from camcal.models.preprocessing import Preprocessing
from camcal.models.reslt import BRANCHES, NormBranches, build_branches, fold


class Explained(NamedTuple):
    """Logits z and the map F̂ that they are linear in: z_k = ⟨W_k, mean of F̂⟩ + b_k, see `LongTailClassifier.rows`."""

    logits_BK: Tensor
    features_BChw: Tensor


class Neck(nn.Module):
    """A 1×1 convolution, batch normalisation and ReLU, trained between a frozen trunk and the head."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, maps_BChw: Tensor) -> Tensor:
        features: Tensor = torch.relu(self.norm(self.convolution(maps_BChw)))
        return features


class LongTailClassifier(nn.Module):
    """A network for uint8 images. It normalises them itself, so that training and serving share every step.

    Args:
        classes: number of classes K.
        preprocessing: its mean and std are applied.
        backbone, weights, output_stride: see `build_backbone`.
        neck: channels of a `Neck` behind the trunk, 0 for none; or `last`, see `camcal.models.timm_trunk.take_last`.
        head, scalar, learn_scalar: see `camcal.models.normalized.build_head`.
        camc: where CAMC takes its evidence from; `taught`, see `TaughtAttention`; or `off`.
        camc_attention, camc_top: see `CAMC`.
        reslt: the form of ResLT's branches, or `off`; see `camcal.models.reslt`.

    Attributes:
        views: what of an image is looked at in evaluation mode, see `camcal.models.bundle.Manifest`. The network of
            `flip` is a mean of two: its logits are the means of theirs, and its maps too.

    Raises:
        ValueError: if there are fewer than two classes, or a part refuses its argument.
    """

    def __init__(
        self,
        classes: int,
        preprocessing: Preprocessing,
        *,
        backbone: str = "resnet32",
        weights: str | None = None,
        output_stride: Literal[8, 16] | None = None,
        neck: int | Literal["last"] = 0,
        head: Literal["linear", "weight", "cosine", "cosnorm", "causal"] = "cosine",
        scalar: float = 16.0,
        learn_scalar: bool = True,
        camc: Literal["off", "weights", "prototypes", "both", "taught"] = "off",
        camc_attention: Attention = "sigmoid",
        camc_top: int = 0,
        reslt: Literal["off", "cifar", "large", "large-official"] = "off",
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {classes}")
        self.views: Views = "one"
        self.trunk, width = build_backbone(backbone, weights, preprocessing.input_size, output_stride)
        self.neck: nn.Module | None = None
        if neck == "last":
            from camcal.models.timm_trunk import take_last

            self.neck = take_last(self.trunk)
        elif neck:
            self.neck, width = Neck(width, neck), neck
        self.branches = None if reslt == "off" else build_branches(reslt, width)
        self.camc: CAMC | TaughtAttention | None = None
        if camc == "taught":
            self.camc = TaughtAttention(width, classes)
        elif camc != "off":
            self.camc = CAMC(width, classes, camc, camc_attention, camc_top)
        self.head: Head = build_head(head, width, classes, scalar, learn_scalar)
        self.rescale = Rescale(classes)
        self.marc = MARC(classes)
        self.register_buffer("temperature", torch.ones(()))
        self.temperature: Tensor
        self.register_buffer("map_shift", torch.zeros(()))
        self.map_shift: Tensor
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).reshape(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def trunk_maps(self, images_BHWC: Tensor) -> Tensor:
        """The trunk's own map, before the neck, B×C×h×w, of images with values in 0..255 (uint8 or floating)."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(self.mean.dtype)
        maps: Tensor = self.trunk((images_BCHW - self.mean) / self.std)
        return maps

    def features(self, images_BHWC: Tensor) -> Tensor:
        """The map F that everything else is computed from, B×C×h×w."""
        return self._from_trunk(self.trunk_maps(images_BHWC))

    def _from_trunk(self, maps_BChw: Tensor) -> Tensor:
        features: Tensor = maps_BChw if self.neck is None else self.neck(maps_BChw)
        return features

    def _branch_maps(self, features_BChw: Tensor) -> Tensor:
        """The maps of the branches, B×R×C×h×w: the map F itself without ResLT."""
        maps: Tensor = features_BChw.unsqueeze(1) if self.branches is None else self.branches(features_BChw)
        return maps

    def _reinforce(self, maps_BRChw: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """The maps reweighted by CAMC, if there is one, whose attention is computed on the branches' sum."""
        if self.camc is None:
            return maps_BRChw
        together_BChw = maps_BRChw.sum(dim=1)
        if isinstance(self.camc, TaughtAttention):
            log_Bhw = self.camc.log_attention(together_BChw)
            if self.training and labels_B is not None:
                self.camc.teach(together_BChw, log_Bhw, labels_B)
            return log_Bhw.exp()[:, None, None] * (maps_BRChw.shape[3] * maps_BRChw.shape[4]) * maps_BRChw
        expected_BK = self.head(maps_BRChw.mean(dim=(3, 4))).sum(dim=1).softmax(dim=1).detach()
        attention_Bhw = self.camc.attention(together_BChw, expected_BK, self.head.weight)
        if self.training and labels_B is not None:
            self.camc.update(together_BChw, labels_B, self.head.weight)
        return (1 + attention_Bhw[:, None, None]) * maps_BRChw

    def forward(self, images_BHWC: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Logits z, B×K, before margin calibration; labels feed CAMC's prototypes.

        While training with branches: the logits of each of them, B×R×K; the prediction is their sum.
        """
        if self.views == "flip" and not self.training:
            return _halves(self._logits(self.features(_both_ways(images_BHWC)), None)).mean(dim=0)
        return self._logits(self.features(images_BHWC), labels_B)

    def logits_of_maps(self, maps_BChw: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """The same as `forward`, from maps given by `trunk_maps`, of the images as they are."""
        return self._logits(self._from_trunk(maps_BChw), labels_B)

    def _logits(self, features_BChw: Tensor, labels_B: Tensor | None) -> Tensor:
        if isinstance(self.camc, TaughtAttention) and self.training and labels_B is not None:
            self.camc.follow(self.head.weight)
            features_BChw = self.camc.exchange(features_BChw, labels_B)
        maps_BRChw = self._branch_maps(features_BChw)
        with torch.autocast(maps_BRChw.device.type, enabled=False):
            pooled_BRC = self._reinforce(maps_BRChw.float(), labels_B).mean(dim=(3, 4))
            logits_BRK: Tensor = self.head(pooled_BRC)
            if self.training and self.branches is not None:
                return logits_BRK
            logits_BK: Tensor = self.rescale(logits_BRK.sum(dim=1))
            return logits_BK

    def explain(self, images_BHWC: Tensor) -> Explained:
        """Logits, and the map that they are linear in: F̂ = Σ_b gain(g_b)⊙F'_b over the branches b."""
        if self.views == "flip":
            logits_VBK, features_VBChw = map(_halves, self.explain_maps(self.trunk_maps(_both_ways(images_BHWC))))
            plain_BChw, mirrored_BChw = features_VBChw
            return Explained(logits_VBK.mean(dim=0), (plain_BChw + mirrored_BChw.flip(3)) / 2)
        return self.explain_maps(self.trunk_maps(images_BHWC))

    def explain_maps(self, maps_BChw: Tensor) -> Explained:
        """The same as `explain`, from maps given by `trunk_maps`, of the images as they are."""
        maps_BRChw = self._reinforce(self._branch_maps(self._from_trunk(maps_BChw)).float())
        pooled_BRC = maps_BRChw.mean(dim=(3, 4))
        logits_BK = self.rescale(self.head(pooled_BRC).sum(dim=1))
        gain_BRC11 = self.head.gain(pooled_BRC)[..., None, None]
        return Explained(logits_BK, (gain_BRC11 * maps_BRChw).sum(dim=1))

    def rows(self) -> tuple[Tensor, Tensor]:
        """W and b of z_k = ⟨W_k, mean of F̂⟩ + b_k, with everything fitted after training, K×C and K."""
        branches = 1 if self.branches is None else BRANCHES
        slopes_K = self.rescale.slopes()
        bias_K = slopes_K * branches * self.head.effective_bias() + self.rescale.shift
        return slopes_K.unsqueeze(1) * self.head.effective_weight(), bias_K

    def weight_norms(self) -> Tensor:
        """‖W_k‖ of those rows, for margin calibration, K values."""
        norms: Tensor = self.rescale.slopes() * self.head.weight_norms()
        return norms

    def calibrate(self, logits_BK: Tensor) -> Tensor:
        """Calibrated logits z', B×K, without the temperature."""
        calibrated: Tensor = self.marc(logits_BK, self.weight_norms())
        return calibrated

    @property
    def shift(self) -> tuple[float, float]:
        """By how many positions maps lie to the right of and below what they show; see `Manifest.shift`."""
        down = float(self.map_shift)
        return (0.0 if self.views == "flip" else down), down

    @property
    def scalar(self) -> float:
        """s after its selection; 1 for a linear head."""
        return float(self.head.scalar.detach() * self.rescale.factor)


def _both_ways(images_BHWC: Tensor) -> Tensor:
    """Images and then their mirror images, 2B×H×W×C."""
    return torch.cat([images_BHWC, images_BHWC.flip(2)])


def _halves(both: Tensor) -> Tensor:
    """What a batch of `_both_ways` gave, 2×B×…"""
    halves: Tensor = both.unflatten(0, (2, -1))
    return halves


def can_fold(network: LongTailClassifier) -> bool:
    """Whether ResLT's branches and the head are together one linear layer on the mean of the trunk's map."""
    return isinstance(network.branches, NormBranches) and network.camc is None and not network.head.has_gain


@torch.no_grad()
def fold_branches(network: LongTailClassifier) -> LongTailClassifier:
    """A copy, in evaluation mode, whose branches and head are one linear layer; its outputs are the same.

    Raises:
        ValueError: if there are no branches, or something in or after them is not linear.
    """
    if not can_fold(network):
        raise ValueError("only ResLT's cifar form folds, without CAMC and with a head that is linear or weight")
    assert isinstance(network.branches, NormBranches)
    folded = copy.deepcopy(network).eval()
    weight_KC, bias_K = fold(network.branches, network.head.effective_weight(), network.head.effective_bias())
    folded.branches = None
    head, scalar = LinearHead(weight_KC.shape[1], weight_KC.shape[0]), network.head.scalar.detach()
    folded.head = head.to(weight_KC.device)
    folded.head.scalar.copy_(scalar)
    folded.head.weight.copy_(weight_KC / scalar)
    folded.head.bias.copy_(bias_K / scalar)
    # β_k·‖W_k‖ stays as fitted, though ‖W_k‖ changes.
    folded.marc.beta.mul_(network.weight_norms() / folded.weight_norms())
    return folded


class ServedClassifier(nn.Module):
    """What is exported: uint8 images and top_k in, logits, probabilities, top classes and their maps out."""

    def __init__(self, network: LongTailClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, top_k: Tensor) -> tuple[Tensor, ...]:
        """The six outputs in the order of `camcal.models.bundle.OUTPUTS`.

        Args:
            images: uint8, B×H×W×3.
            top_k: int64 scalar, 1..K; classes are ranked by calibrated logit.
        """
        network = self.network
        logits_BK, features_BChw = network.explain(images)
        calibrated_BK = network.calibrate(logits_BK)
        k = cast(int, top_k.item())
        torch._check(k >= 1)
        torch._check(k <= logits_BK.shape[1])
        top_Bk = calibrated_BK.topk(k, dim=1).indices
        weight_KC, bias_K = network.rows()
        maps = cam.contributions(features_BChw, weight_KC[top_Bk], bias_K[top_Bk])
        probabilities_BK = logits_BK.softmax(dim=1)
        calibrated_probabilities_BK = (calibrated_BK / network.temperature).softmax(dim=1)
        return logits_BK, calibrated_BK, probabilities_BK, calibrated_probabilities_BK, top_Bk, maps
