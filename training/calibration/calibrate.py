"""After training: rescale the logits, fit margins on cached logits, fit the temperature. N samples, K classes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.classifier import LongTailClassifier
from camcal.models.marc import MARC
from camcal.models.normalized import Rescale, WeightNormHead, tau_norm
from camcal.models.report import FittedCalibration, TauPoint
from camcal.training.calibration.logits import TrainedLogits
from camcal.training.calibration.margins import MIN_OMEGA, fit_lws, fit_marc
from camcal.training.calibration.placement import measure_shift
from camcal.training.calibration.temperature import fit_lean, fit_scale, fit_temperature, lean_offset, mean_nll
from camcal.training.data import Dataset
from camcal.training.fitting.learned_prior import balanced_twice, is_balanced, logit_prior
from camcal.training.priors import Floats, even_prior, given_prior, prior_weights
from camcal.training.recipe import Recipe
from camcal.training.run import Run

TAUS = tuple(t / 10 for t in range(21))
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
FEW_HELD = 200


class CalibrationError(ValueError):
    """Fits without a usable result."""


class _Cache:
    """Trained logits of the training and held-out images, with their labels."""

    def __init__(self, logits: TrainedLogits, data: Dataset, recipe: Recipe) -> None:
        self.logits, self.data, self.recipe = logits, data, recipe
        self.classes = len(data.classes)
        self.counts_K = data.train.labels.bincount(minlength=self.classes).numpy()
        self.held_labels = data.holdout.labels
        self.held_NK = logits.holdout(data)
        self._train_NK: Tensor | None = None

    @property
    def train_NK(self) -> Tensor:
        """One block of rows a pass, computed when first needed; see `train_labels`."""
        if self._train_NK is None:
            self._train_NK = self.logits.train(self.data, self.recipe)
        return self._train_NK

    @property
    def train_labels(self) -> Tensor:
        return self.data.train.labels.repeat(self.recipe.calibrate.passes)

    def train_accuracy(self) -> float | None:
        """Of the training logits; None if nothing needed them."""
        if self._train_NK is None:
            return None
        return float((self._train_NK.argmax(dim=1) == self.train_labels).double().mean())

    def samples(self, held: Tensor) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
        """What margins are fitted on, with these held-out positions: logits, labels, and images per class."""
        on = self.recipe.calibrate.marc_on
        held_NK, held_labels = self.held_NK[held], self.held_labels[held]
        if on == "train":
            return self.train_NK, self.train_labels, self.counts_K
        counts_K = held_labels.bincount(minlength=self.classes).numpy()
        if on == "holdout":
            return held_NK, held_labels, counts_K
        passes = self.recipe.calibrate.passes
        logits_NK = torch.cat([self.train_NK, held_NK.repeat(passes, 1)])
        return logits_NK, torch.cat([self.train_labels, held_labels.repeat(passes)]), counts_K + self.counts_K


def calibrate(run: Run, network: LongTailClassifier) -> FittedCalibration:
    """Rescale, fit margins, lean and temperature, in this order, and store them. The test part is not looked at.

    The scalar is selected by the likelihood of held-out images under the class prior that the logits are trained for;
    lean and temperature by class-balanced likelihood, since calibrated probabilities are for the balanced prior, and
    the temperature again for each prior that they may be shifted to, since under it other classes determine the right
    confidence. MARC is fitted on cached logits of augmented training images, with the frozen network in evaluation
    mode, or on the held-out part as well: then lean and temperatures are fitted on held-out logits that were calibrated
    by margins fitted without them. The lean is stored as a part of MARC's β.

    Args:
        run: its recipe says what to fit, and trained logits are kept in its folder.
        network: as trained; what an earlier calibration stored in it is replaced.

    Raises:
        CalibrationError: if the logits or the fitted values are not finite, or margins are to be fitted on too few
            held-out images.
    """
    return _Calibration(run, network).fit()


def calibrate_retrained(run: Run, network: LongTailClassifier, first: FittedCalibration) -> FittedCalibration:
    """Calibrate a network that was trained again on all images, so that none is held out.

    Only margins are fitted. Scalar, lean and temperatures are those of `first`, which were found for the first network
    of the same recipe. Raises as `calibrate` does.
    """
    return _Calibration(run, network).take_over(first)


class _Calibration:
    """A network being calibrated."""

    def __init__(self, run: Run, network: LongTailClassifier) -> None:
        self.began = time.perf_counter()
        self.recipe, self.network = run.recipe, network.eval()
        network.views = run.recipe.calibrate.views
        self.map_shift = measure_shift(network, run.data.train, run.recipe.seed)
        network.map_shift.fill_(self.map_shift)
        network.rescale.load_state_dict(Rescale(len(run.data.classes)).state_dict())
        self.logits = TrainedLogits(network, run.folder.logits)
        self.cache = _Cache(self.logits, run.data, run.recipe)
        self.learned_K = logit_prior(run.recipe, self.cache.counts_K)
        self.priors = other_priors(run.recipe, run.data)
        self.even_K = even_prior(self.cache.classes)
        self.weights_N = self._held_weights(self.even_K)
        self.tau: float | None = None
        self.tau_curve: list[TauPoint] = []

    def fit(self) -> FittedCalibration:
        settings, held_labels = self.recipe.calibrate, self.cache.held_labels
        self._rescale()
        margins_NK, penalty = _fit_margins(self.network, self.cache, self.learned_K, self.weights_N)
        if settings.lean:
            lean, temperature = fit_lean(margins_NK, held_labels, self.priors["train"], settings.spread)
        else:
            lean, temperature = 0.0, fit_temperature(margins_NK, held_labels, self.even_K, settings.spread)
        calibrated_NK = self._store(margins_NK, lean, temperature)
        temperatures = {
            name: fit_temperature(calibrated_NK, held_labels, wanted_K, settings.spread)
            for name, wanted_K in self.priors.items()
        }
        warnings = _warnings(self.recipe, self.learned_K, self.cache.counts_K, len(held_labels))
        return self._found(penalty, lean, temperatures, warnings)

    def take_over(self, first: FittedCalibration) -> FittedCalibration:
        if isinstance(self.network.head, WeightNormHead) and self.recipe.calibrate.scalar == "select":
            self.network.rescale.factor.fill_(first.scalar / self.network.head.scalar.item())
        margins_NK, penalty = _fit_margins(self.network, self.cache, self.learned_K, self.weights_N)
        self._store(margins_NK, first.lean, first.temperature)
        return self._found(penalty, first.lean, first.prior_temperatures, first.warnings)

    def _held_weights(self, prior_K: Floats) -> Tensor:
        """Weights under which the held-out images have these class frequencies."""
        return torch.from_numpy(prior_weights(self.cache.held_labels.numpy(), prior_K))

    def _rescale(self) -> None:
        """Select the scalar, or scale the rows of a linear head, as the recipe says."""
        settings, cache, rescale = self.recipe.calibrate, self.cache, self.network.rescale
        if isinstance(self.network.head, WeightNormHead):
            if settings.scalar == "select":
                weights_N = self._held_weights(self.learned_K)
                rescale.factor.fill_(fit_scale(cache.held_NK, cache.held_labels, weights_N, settings.spread))
        elif settings.rescale == "tau":
            self.tau, self.tau_curve = _fit_tau(self.network, cache, self.weights_N)
        elif settings.rescale == "lws":
            scale_K = fit_lws(cache.train_NK, cache.train_labels, cache.counts_K, settings, self.recipe.seed)
            rescale.scale.copy_(scale_K)

    def _store(self, margins_NK: Tensor, lean: float, temperature: float) -> Tensor:
        """Store lean and temperature in the network; returns the held-out logits with the lean taken out."""
        network, offset_K = self.network, lean_offset(lean, temperature, self.priors["train"])
        network.marc.beta.data += offset_K.to(network.mean.device) / network.weight_norms()
        network.temperature.fill_(temperature)
        _check_finite(network, margins_NK)
        return margins_NK + offset_K

    def _found(
        self, penalty: float, lean: float, prior_temperatures: dict[str, float], warnings: list[str]
    ) -> FittedCalibration:
        network = self.network
        return FittedCalibration(
            trained_scalar=network.head.scalar.item(),
            scalar=network.scalar,
            lean=lean,
            tau=self.tau,
            tau_curve=self.tau_curve,
            temperature=float(network.temperature),
            prior_temperatures=prior_temperatures,
            logit_prior=self.learned_K.tolist(),
            penalty=penalty,
            omega_at_bound=int((network.marc.omega <= 1.01 * MIN_OMEGA).sum()),
            map_shift=self.map_shift,
            train_accuracy=self.cache.train_accuracy(),
            logits_s=round(self.logits.seconds, 2),
            fits_s=round(time.perf_counter() - self.began - self.logits.seconds, 2),
            warnings=warnings,
        )


def _check_finite(network: LongTailClassifier, logits_NK: Tensor) -> None:
    values = (logits_NK, network.rescale.factor, network.marc.omega, network.marc.beta, network.temperature)
    if not all(value.isfinite().all() for value in values):
        raise CalibrationError(
            "calibration did not end in finite numbers: lower calibrate.lr or calibrate.exponent, unless the "
            "trained network itself is broken"
        )


def other_priors(recipe: Recipe, data: Dataset) -> dict[str, Floats]:
    """The priors that probabilities can be for besides the balanced one, K values each: `train`, and `given`."""
    counts_K = data.train_counts()
    priors: dict[str, Floats] = {"train": counts_K / counts_K.sum()}
    if recipe.calibrate.prior is not None:
        priors["given"] = given_prior(recipe.calibrate.prior, data.classes)
    return priors


def _fit_tau(network: LongTailClassifier, cache: _Cache, weights_N: Tensor) -> tuple[float, list[TauPoint]]:
    """Try τ from 0 to 2, or take the given one, and store the best at its best scale, by class-balanced likelihood."""
    labels_N = cache.held_labels
    weight_KC, bias_K = (rows.detach().cpu() for rows in network.rows())  # the bias of all branches together
    curve: list[TauPoint] = []
    best = (math.inf, 0.0, torch.empty(0), torch.empty(0))
    for tau in TAUS if cache.recipe.calibrate.tau is None else (cache.recipe.calibrate.tau,):
        scale_K, shift_K = tau_norm(weight_KC, bias_K, tau)
        scale_K, shift_K = scale_K / scale_K.mean(), shift_K / scale_K.mean()  # about as large as the trained logits
        logits_NK = scale_K * cache.held_NK + shift_K
        factor = fit_scale(logits_NK, labels_N, weights_N, cache.recipe.calibrate.spread)
        nll = mean_nll(factor * logits_NK, labels_N, weights_N)
        hits_N = (logits_NK.argmax(dim=1) == labels_N).double()
        curve.append(TauPoint(tau=tau, accuracy=float(weights_N @ hits_N / weights_N.sum()), nll=nll))
        if nll < best[0]:
            best = (nll, tau, factor * scale_K, factor * shift_K)
    network.rescale.scale.copy_(best[2])
    network.rescale.shift.copy_(best[3])
    return best[1], curve


def _fit_margins(
    network: LongTailClassifier, cache: _Cache, prior_K: Floats, weights_N: Tensor
) -> tuple[Tensor, float]:
    """Fit and store ω and β.

    Returns the held-out logits, calibrated by margins that were fitted without them, and the penalty of the fit. If
    held-out images take part and no penalty is given, it is the one of `PENALTIES` for which these logits, at their
    best temperature, have the best class-balanced likelihood.
    """
    config, margins = cache.recipe.calibrate, _Margins(network, cache, prior_K)
    everything = torch.arange(len(cache.held_labels))
    if not config.marc or config.marc_on == "train":
        penalty = config.penalty or 0.0
        marc = margins.fit(everything, penalty)
        unseen_NK = margins.calibrated(marc, everything)
    else:
        if config.marc_on == "holdout" and len(everything) < 2:
            raise CalibrationError(
                f"calibrate.marc_on = 'holdout' needs two held-out images, and there are {len(everything)}: use 'both' "
                "or a larger data.holdout_fraction"
            )
        candidates = margins.unseen(PENALTIES if config.penalty is None else (config.penalty,))
        penalty = min(candidates, key=lambda p: _best_nll(candidates[p], cache.held_labels, weights_N))
        marc, unseen_NK = margins.fit(everything, penalty), candidates[penalty]
    network.marc.load_state_dict(marc.state_dict())
    return unseen_NK, penalty


def _best_nll(logits_NK: Tensor, labels_N: Tensor, weights_N: Tensor) -> float:
    """At the best temperature."""
    return mean_nll(fit_scale(logits_NK, labels_N, weights_N) * logits_NK, labels_N, weights_N)


class _Margins:
    """Fits of MARC to the cached logits of a network that is rescaled already.

    Args:
        prior_K: the class prior that the trained logits are for.
    """

    def __init__(self, network: LongTailClassifier, cache: _Cache, prior_K: Floats) -> None:
        self.cache, self.config = cache, cache.recipe.calibrate
        self.norms_K = network.weight_norms().detach().cpu()
        self.rescale = Rescale(cache.classes)
        self.rescale.load_state_dict(network.rescale.state_dict())
        self.held_NK = self.rescale(cache.held_NK)
        as_published = self.config.marc and self.config.marc_on == "train"
        start = self.config.start or ("identity" if as_published or self.config.rescale != "off" else "prior")
        self.start_K = torch.zeros(cache.classes)
        if start == "prior":
            self.start_K = -torch.from_numpy(np.log(prior_K * cache.classes)).float()

    def fit(self, held: Tensor, penalty: float, near: MARC | None = None) -> MARC:
        """Margins fitted with these held-out positions, as far as the recipe uses them; `near` as in `fit_marc`."""
        if not self.config.marc:
            marc = MARC(self.cache.classes)
            marc.beta.data = self.start_K / self.norms_K
            return marc
        logits_NK, labels_N, counts_K = self.cache.samples(held)
        logits_NK, seed = self.rescale(logits_NK), self.cache.recipe.seed
        return fit_marc(logits_NK, labels_N, self.norms_K, counts_K, self.config, seed, self.start_K, penalty, near)

    def calibrated(self, marc: MARC, held: Tensor) -> Tensor:
        """The held-out logits at these positions."""
        found: Tensor = marc(self.held_NK[held], self.norms_K).detach()
        return found

    def unseen(self, penalties: Sequence[float]) -> dict[float, Tensor]:
        """For each penalty, the held-out logits of each half, calibrated by margins fitted on the other half.

        The halves alternate within each class.
        """
        everything = torch.arange(len(self.held_NK))
        half_N = torch.empty_like(everything)
        half_N[self.cache.held_labels.argsort(stable=True)] = everything % 2
        found = {penalty: torch.empty_like(self.held_NK) for penalty in penalties}
        for half in (0, 1):
            marc = None
            for penalty in sorted(penalties, reverse=True):  # the strongest is quickest, and a start for the next
                marc = self.fit(everything[half_N != half], penalty, marc)
                found[penalty][half_N == half] = self.calibrated(marc, everything[half_N == half])
        return found


def _warnings(recipe: Recipe, prior_K: Floats, counts_K: NDArray[np.int64], held: int) -> list[str]:
    config, warnings = recipe.calibrate, []
    if held < FEW_HELD:
        warnings.append(
            f"only {held} images are held out, so scalar and temperature are rough estimates; more images, or a larger "
            "data.holdout_fraction, improve them"
        )
    if (turned := balanced_twice(prior_K, counts_K)) is not None:
        warnings.append(turned)
    elif config.marc and is_balanced(prior_K, counts_K):
        warnings.append(
            "the loss or the sampler balances the classes already; MARC on top may cost accuracy: compare with "
            "--set calibrate.marc=false"
        )
    elif config.marc and config.rescale != "off":
        warnings.append(f"MARC on top of calibrate.rescale = {config.rescale!r} balances the classes twice")
    if recipe.loss.smoothing:
        warnings.append(
            "loss.smoothing brings the logits of common and rare classes closer than the class prior implies: "
            "subtracting the logarithm of the prior then favours rare classes"
        )
    return warnings
