"""The moving average of a network's weights."""

from __future__ import annotations

from camcal.models.classifier import LongTailClassifier


class Average:
    """Exponential moving average of a network's weights and batch statistics (Polyak averaging, as timm computes it).

    w̄ ← d·w̄ + (1-d)·w after step t = 0, 1, …, with d = min(decay, t/(t+9)), so that it is not dominated by the initial
    weights in a short run. Integers are copied.

    Args:
        network: starts the average.
        decay: of the average per step, below 1.

    Attributes:
        network: the averaged network, in evaluation mode; its parameters need no gradient.
    """

    def __init__(self, network: LongTailClassifier, decay: float) -> None:
        from timm.utils.model_ema import ModelEmaV3  # takes a second to import

        self._ema = ModelEmaV3(network, decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
        self.network: LongTailClassifier = self._ema.module.requires_grad_(False)

    def begin(self, network: LongTailClassifier) -> None:
        """Start again from the weights of this network."""
        self._ema.set(network)  # type: ignore[no-untyped-call]

    def update(self, network: LongTailClassifier, step: int) -> None:
        """Take the weights after a step into the average; the first step is 0."""
        self._ema.update(network, step + 1)
