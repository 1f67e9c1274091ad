"""Initial weights for training on a frozen trunk. B batch, C channels, h w map size, K classes."""

from __future__ import annotations

import torch
from torch.nn import functional

from camcal.models.classifier import LongTailClassifier, Neck
from camcal.training.data import Images
from camcal.training.data.features import BATCH


@torch.no_grad()
def start_at_class_means(network: LongTailClassifier, train: Images) -> None:
    """Set each class's weights to the mean direction of its training images (LIFT, arXiv 2309.10019).

    The batch statistics of an untrained neck are computed from the same maps first.
    """
    device, classes = network.mean.device, len(network.rescale.scale)
    indices = torch.arange(len(train)).split(BATCH)
    network.eval()
    if isinstance(network.neck, Neck):
        norm = network.neck.norm
        usual, norm.momentum = norm.momentum, None  # None: the mean over all batches
        network.neck.train()
        for maps_BChw, _ in train.batches(indices, device):
            network.neck(maps_BChw)
        network.neck.eval()
        norm.momentum = usual
    sums_KC = torch.zeros(classes, network.head.weight.shape[1], device=device)
    for maps_BChw, labels_B in train.batches(indices, device):
        features_BChw = maps_BChw if network.neck is None else network.neck(maps_BChw)
        sums_KC.index_add_(0, labels_B, functional.normalize(features_BChw.mean(dim=(2, 3)), dim=1))
    network.head.weight.copy_(functional.normalize(sums_KC, dim=1))
