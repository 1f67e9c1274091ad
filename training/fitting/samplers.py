"""How often each class occurs in an epoch (Kang et al., Decoupling, arXiv 1910.09217). N samples, K classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sampler = Literal["instance", "class_balanced", "square_root", "progressive"]


def class_shares(sampler: Sampler, counts_K: NDArray[np.int64], progress: float) -> NDArray[np.float64]:
    """The share of each class among the samples drawn, K values: n_k^q/Σ_j n_j^q.

    `instance` has q = 1, `square_root` q = 1/2, `class_balanced` q = 0; `progressive` goes from the first to the last:
    (1 - t)·instance + t·class_balanced.

    Args:
        progress: t, the epochs done over all epochs.
    """
    if sampler == "progressive":
        return np.asarray(
            (1 - progress) * class_shares("instance", counts_K, progress)
            + progress * class_shares("class_balanced", counts_K, progress)
        )
    powers_K = counts_K.astype(np.float64) ** {"instance": 1.0, "square_root": 0.5, "class_balanced": 0.0}[sampler]
    return np.asarray(powers_K / powers_K.sum())


def epoch_order(sampler: Sampler, labels_N: Tensor, progress: float, generator: torch.Generator) -> Tensor:
    """The positions of an epoch's samples in their order, N of them.

    With `instance` each sample occurs once. The others draw with replacement: a class by its share, and each of its
    samples with equal chance.

    Args:
        progress: the epochs done over all epochs.
    """
    if sampler == "instance":
        return torch.randperm(len(labels_N), generator=generator)
    labels_N = labels_N.cpu()
    counts_K = np.bincount(labels_N.numpy())
    shares_K = class_shares(sampler, counts_K, progress) / np.maximum(counts_K, 1)
    chances_N = torch.from_numpy(shares_K)[labels_N]
    return torch.multinomial(chances_N, len(labels_N), replacement=True, generator=generator)
