"""The family of calibrations, from one number to 2K: each fitted, and judged on images that it has not seen.

All of them give softmax((ω_k·z_k + offset_k)/T) for the balanced prior. N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.report import Method
from camcal.training.calibration import crossfit
from camcal.training.calibration.margins import Margins, fit_marc, fit_shrunk
from camcal.training.calibration.temperature import fit_lean, fit_scale, fit_temperature, lean_offset
from camcal.training.fitting.learned_prior import is_balanced
from camcal.training.priors import Floats, even_prior, prior_weights
from camcal.training.recipe import Recipe

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
LARGEST = 2**25
"""Held-out logits up to which `auto` tries `shrunk`, whose two dozen fits would take an hour beyond."""


class CalibrationError(ValueError):
    """Fits without a usable result."""


@dataclass(frozen=True, kw_only=True)
class FitData:
    """Logits that calibrations are fitted to, after the scalar.

    held_NK, held_labels_N: of held-out images.
    prior_K: q, the class prior that softmax of these logits is for; even for rescaled logits.
    train_prior_K: the training frequencies.
    training: logits and labels of training images, and their number per class; computed when first called.
    """

    held_NK: Tensor
    held_labels_N: Tensor
    prior_K: Floats
    weight_norms_K: Tensor
    train_prior_K: Floats
    training: Callable[[], tuple[Tensor, Tensor, NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted calibration.

    margins: ω and offset, the lean included.
    unseen_NK: held-out logits z′ by margins that were fitted without their image, the lean included.
    nll: the mean of -log p of held-out images, class-balanced, each by a calibration that was fitted without it.
    losses_N: the same of each, with the doubt of `crossfit.losses`, by which calibrations are compared; empty with
        fewer than two images, of which there is no nll.
    """

    method: Method
    numbers: int
    margins: Margins
    lean: float
    temperature: float
    penalty: float
    unseen_NK: Tensor
    nll: float | None
    losses_N: Floats


def wanted(recipe: Recipe, prior_K: Floats, counts_K: NDArray[np.int64], held: int) -> list[Method]:
    """The methods to be fitted: the recipe's, or those that `auto` compares.

    Args:
        prior_K: the class prior that the trained logits are for.
        counts_K: training images per class.
        held: the number of held-out images.
    """
    config = recipe.calibrate
    if config.method != "auto":
        return [config.method]
    if held < 2:
        return ["temperature"]
    found: list[Method] = ["temperature", "lean"]
    if config.rescale == "off" and not is_balanced(prior_K, counts_K):
        found.append("marc")
    if held * len(counts_K) <= LARGEST:
        found.append("shrunk")
    return found


def _numbers(method: Method, classes: int, leaning: bool) -> int:
    """What is fitted after the scalar."""
    margins = 2 * classes if method in ("marc", "shrunk") else 0
    return margins + 1 + (leaning or method == "shrunk")


class Methods:
    """Fits of each method to the logits of one network."""

    def __init__(self, recipe: Recipe, data: FitData) -> None:
        self.config, self.seed, self.data = recipe.calibrate, recipe.seed, data
        self.labels_N, self.classes = data.held_labels_N, len(data.prior_K)
        self.minus_prior_K = -torch.from_numpy(np.log(data.prior_K * self.classes)).float()
        self.everything = torch.arange(len(self.labels_N))
        self.parts = crossfit.folds(self.labels_N)
        self.even_K = even_prior(self.classes)
        self.weights_N = prior_weights(self.labels_N.numpy(), self.even_K)
        self.doubt = crossfit.doubt(self.weights_N)

    def fit(self, method: Method) -> Fit:
        """Fit and judge one method.

        Raises:
            CalibrationError: if margins are to be fitted on fewer than two held-out images.
        """
        leaning = method == "lean" or (method == "marc" and self.config.marc_lean)
        margins, unseen_NK, penalty = self._margins(method)
        end = self._end(leaning, self.data.prior_K if method in ("temperature", "lean") else self.even_K)
        plain_N, losses_N = self._cross_fitted(unseen_NK, end)
        lean, temperature, offset_K = end(unseen_NK, self.labels_N)
        if method == "shrunk":
            # Its margins hold a lean and a temperature already. Of the size of z, that temperature is one of z.
            lean, inner = self._leaning(self.everything)
            margins, unseen_NK = Margins(*(inner * values_K for values_K in margins)), inner * unseen_NK
            temperature *= inner
        return Fit(
            method=method,
            numbers=_numbers(method, self.classes, leaning),
            margins=Margins(margins.omega_K, margins.offset_K + offset_K),
            lean=lean,
            temperature=temperature,
            penalty=penalty,
            unseen_NK=unseen_NK + offset_K,
            nll=float(self.weights_N @ plain_N / self.weights_N.sum()) if len(plain_N) else None,
            losses_N=losses_N,
        )

    def _end(self, leaning: bool, raw_prior_K: Floats) -> Callable[[Tensor, Tensor], tuple[float, float, Tensor]]:
        """A fit of what comes last, to logits that are for a prior q, and their labels.

        It returns the lean δ, 0 unless it is fitted; the temperature T; and what is added to logits before division by
        T for softmax(z/T - log q - δ·log π).
        """
        even, train_K, spread = bool(np.ptp(raw_prior_K) == 0), self.data.train_prior_K, self.config.spread

        def fit(logits_NK: Tensor, labels_N: Tensor) -> tuple[float, float, Tensor]:
            lean = 0.0
            if leaning:
                lean, temperature = fit_lean(logits_NK, labels_N, train_K, spread, raw_prior_K)
            else:
                temperature = fit_temperature(logits_NK, labels_N, self.even_K, spread, raw_prior_K)
            offset_K = lean_offset(lean, temperature, train_K)
            return lean, temperature, offset_K if even else offset_K + temperature * self.minus_prior_K

        return fit

    def _cross_fitted(
        self, unseen_NK: Tensor, end: Callable[[Tensor, Tensor], tuple[float, float, Tensor]]
    ) -> tuple[Floats, Floats]:
        """The loss of each held-out image without and with a doubt, lean and temperature fitted without its part."""
        if len(self.parts) < 2:
            return np.empty(0), np.empty(0)
        logits_NK = torch.empty_like(unseen_NK)
        for i, part in enumerate(self.parts):
            others = crossfit.rest(self.parts, i)
            _, temperature, offset_K = end(unseen_NK[others], self.labels_N[others])
            logits_NK[part] = (unseen_NK[part] + offset_K) / temperature
        return crossfit.losses(logits_NK, self.labels_N), crossfit.losses(logits_NK, self.labels_N, self.doubt)

    def marc_of_training(self) -> Margins:
        """MARC as published, on logits of training images."""
        return self._marc(self.everything[:0], self.config.penalty or 0.0, None)

    def _margins(self, method: Method) -> tuple[Margins, Tensor, float]:
        """ω and offset, the held-out logits by margins that have not seen them, and the penalty."""
        data, config = self.data, self.config
        if method in ("temperature", "lean"):
            return Margins.none(self.classes), data.held_NK, 0.0
        if method == "marc" and config.marc_on == "train":
            margins = self.marc_of_training()
            return margins, margins.of(data.held_NK), config.penalty or 0.0
        if len(self.labels_N) < 2:
            key = "method = 'shrunk'" if method == "shrunk" else "marc_on = 'both'"
            raise CalibrationError(
                f"calibrate.{key} needs two held-out images, and there are {len(self.labels_N)}: use "
                "calibrate.method = 'temperature' or a larger data.holdout_fraction"
            )
        penalties = PENALTIES if config.penalty is None else (config.penalty,)
        fit = self._marc if method == "marc" else self._shrunk
        penalty, unseen_NK = self._without(penalties, fit)
        return fit(self.everything, penalty, None), unseen_NK, penalty

    def _marc(self, held: Tensor, penalty: float, near: Margins | None) -> Margins:
        """Margins of training images and of these held-out ones, from the identity without them."""
        logits_NK, labels_N, counts_K = self.data.training()
        start_K = torch.zeros(self.classes)
        if len(held):
            passes = len(labels_N) // int(counts_K.sum())
            held_NK, held_labels_N = self.data.held_NK[held], self.labels_N[held]
            logits_NK = torch.cat([logits_NK, held_NK.repeat(passes, 1)])
            labels_N = torch.cat([labels_N, held_labels_N.repeat(passes)])
            counts_K = counts_K + held_labels_N.bincount(minlength=self.classes).numpy()
            start_K = self.minus_prior_K
        norms_K = self.data.weight_norms_K
        marc = fit_marc(logits_NK, labels_N, norms_K, counts_K, self.config, self.seed, start_K, penalty, near)
        return Margins(marc.omega.detach(), marc.beta.detach() * norms_K)

    def _leaning(self, held: Tensor) -> tuple[float, float]:
        data = self.data
        return fit_lean(data.held_NK[held], self.labels_N[held], data.train_prior_K, self.config.spread, data.prior_K)

    def _shrunk(self, held: Tensor, penalty: float, near: Margins | None) -> Margins:
        """Margins near `lean` that need no temperature, by these held-out images; `near` as in `fit_shrunk`."""
        data = self.data
        lean, temperature = self._leaning(held)
        centre_K = self.minus_prior_K + lean_offset(lean, 1.0, data.train_prior_K)
        if near is not None:
            omega_K = near.omega_K * temperature
            near = Margins(omega_K, near.offset_K - omega_K * centre_K)
        found = fit_shrunk(data.held_NK[held] / temperature + centre_K, self.labels_N[held], penalty, near)
        return Margins(found.omega_K / temperature, found.omega_K * centre_K + found.offset_K)

    def _without(
        self, penalties: tuple[float, ...], fit: Callable[[Tensor, float, Margins | None], Margins]
    ) -> tuple[float, Tensor]:
        """The best penalty, and the held-out logits of each part by margins of the other parts."""
        unseen = {penalty: torch.empty_like(self.data.held_NK) for penalty in penalties}
        for i, part in enumerate(self.parts):
            near = None
            for penalty in sorted(penalties, reverse=True):  # the strongest is quickest, and a start for the next
                near = fit(crossfit.rest(self.parts, i), penalty, near)
                unseen[penalty][part] = near.of(self.data.held_NK[part])
        return crossfit.choose_penalty(unseen, self.parts, self._losses, self.weights_N)

    def _losses(self, logits_NK: Tensor) -> Floats:
        """At the best temperature."""
        factor = fit_scale(logits_NK, self.labels_N, torch.from_numpy(self.weights_N))
        return crossfit.losses(factor * logits_NK, self.labels_N, self.doubt)


def choose(fits: list[Fit], weights_N: Floats) -> Fit:
    """The calibration to serve, see `crossfit.simplest`."""
    if len(fits) == 1:
        return fits[0]
    return fits[crossfit.simplest([fit.losses_N for fit in fits], [fit.numbers for fit in fits], weights_N)]
