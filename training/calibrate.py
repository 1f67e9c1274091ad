"""After training: select the scalar, fit MARC on cached logits, fit the temperature. N samples, K classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from models.classifier import LongTailClassifier
from models.marc import MARC
from models.normalized import CosineHead
from training.config import CalibrateConfig, Recipe
from training.data import Dataset, Images
from training.data.augment import Augment

MIN_OMEGA = 1e-3


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What calibration found.

    trained_scalar, scalar: s before and after its selection. omega_at_bound: classes whose ω met its lower bound.
    """

    trained_scalar: float
    scalar: float
    temperature: float
    omega_at_bound: int


def calibrate(network: LongTailClassifier, data: Dataset, recipe: Recipe) -> Fitted:
    """Fit all three in order and store them in the network. The test part is not looked at.

    The scalar and the temperature are fitted on the held-out part: the scalar by plain likelihood, since raw
    probabilities are for the training prior; the temperature by class-balanced likelihood, since calibrated ones are
    for the balanced prior. MARC is fitted on augmented training images, with the frozen network in evaluation mode.
    """
    network.eval()
    trained_scalar = network.head.scalar.item()
    held_NK, held_labels = predict_logits(network, data.holdout), data.holdout.labels
    if isinstance(network.head, CosineHead):
        factor = fit_scale(held_NK, held_labels, torch.ones(len(held_labels)))
        with torch.no_grad():
            network.head.scalar.mul_(factor)
        held_NK = held_NK * factor
    at_bound = _fit_marc(network, data, recipe) if recipe.calibrate.marc else 0
    with torch.no_grad():
        weights_N = 1 / held_labels.bincount(minlength=len(data.classes))[held_labels]
        network.temperature.fill_(1 / fit_scale(network.calibrate(held_NK), held_labels, weights_N))
    return Fitted(
        trained_scalar=trained_scalar,
        scalar=network.head.scalar.item(),
        temperature=float(network.temperature),
        omega_at_bound=at_bound,
    )


@torch.no_grad()
def predict_logits(
    network: LongTailClassifier, part: Images, augment: Augment | None = None, batch_size: int = 256
) -> Tensor:
    """Logits z, N×K in fp32 on the CPU, of a part of the data; the network is used in the mode it is in."""
    batches = part.batches(torch.arange(len(part)).split(batch_size), network.mean.device, augment)
    return torch.cat([network(images_BHWC).float().cpu() for images_BHWC, _ in batches])


def fit_scale(logits_NK: Tensor, labels_N: Tensor, weights_N: Tensor) -> float:
    """The factor a > 0 for which softmax(a·z) has the least weighted negative log-likelihood.

    The likelihood is convex in a; a golden-section search over log a in [-4, 4] finds it to 1e-6.
    """
    logits_NK, weights_N = logits_NK.double(), weights_N.double() / weights_N.double().sum()

    def loss(log_a: float) -> float:
        losses_N = functional.cross_entropy(math.exp(log_a) * logits_NK, labels_N, reduction="none")
        return float(weights_N @ losses_N)

    return math.exp(_golden_section(loss, -4.0, 4.0))


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-6) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


def class_weights(counts_K: NDArray[np.int64], exponent: float) -> Tensor:
    """Generalised re-weighting: w_k ∝ (n_k/N)^-exponent, rescaled to sum to K (MARC, arXiv 2112.07225)."""
    weights = (counts_K / counts_K.sum()) ** -exponent
    return torch.from_numpy(weights * len(counts_K) / weights.sum()).float()


def _fit_marc(network: LongTailClassifier, data: Dataset, recipe: Recipe) -> int:
    config, device = recipe.calibrate, network.mean.device
    augment = Augment(recipe.augment, torch.Generator(device).manual_seed(recipe.seed))
    logits_NK = torch.cat([predict_logits(network, data.train, augment) for _ in range(config.passes)])
    labels_N = data.train.labels.repeat(config.passes)
    counts_K = np.bincount(data.train.labels.numpy(), minlength=len(data.classes))
    marc = fit_marc(logits_NK, labels_N, network.head.weight_norms().detach().cpu(), counts_K, config, recipe.seed)
    network.marc.load_state_dict(marc.state_dict())
    return int((marc.omega <= MIN_OMEGA).sum())


def fit_marc(
    logits_NK: Tensor,
    labels_N: Tensor,
    weight_norms_K: Tensor,
    counts_K: NDArray[np.int64],
    config: CalibrateConfig,
    seed: int,
) -> MARC:
    """ω and β by SGD on cached logits: instance sampling, re-weighted cross-entropy, a cosine rate to zero.

    ω is kept at or above `MIN_OMEGA` after every step: the published method leaves its sign free, but a negative one
    would turn a class's map upside down.
    """
    marc = MARC(logits_NK.shape[1])
    weights_K = class_weights(counts_K, config.exponent)
    optimizer = torch.optim.SGD(marc.parameters(), lr=config.lr, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.iterations):
        index = torch.randint(len(labels_N), (config.batch_size,), generator=generator)
        loss = functional.cross_entropy(marc(logits_NK[index], weight_norms_K), labels_N[index], weight=weights_K)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            marc.omega.clamp_(min=MIN_OMEGA)
    return marc
