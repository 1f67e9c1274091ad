"""After training: rescale the logits, fit calibrations to cached logits, choose one. N samples, K classes."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.classifier import LongTailClassifier
from camcal.models.normalized import Rescale, WeightNormHead, tau_norm
from camcal.models.report import Candidate, FittedCalibration, TauPoint
from camcal.training.calibration import crossfit
from camcal.training.calibration.logits import TrainedLogits
from camcal.training.calibration.margins import MIN_OMEGA, Margins, fit_lws
from camcal.training.calibration.methods import CalibrationError, Fit, FitData, Methods, choose, wanted
from camcal.training.calibration.placement import measure_shift
from camcal.training.calibration.temperature import fit_scale, fit_temperature, lean_offset, mean_nll
from camcal.training.data import Dataset
from camcal.training.fitting.learned_prior import balanced_twice, is_balanced, logit_prior
from camcal.training.priors import Floats, even_prior, given_prior, prior_weights
from camcal.training.recipe import Recipe
from camcal.training.run import Run

TAUS = tuple(t / 10 for t in range(21))
FEW_HELD = 200


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


def calibrate(run: Run, network: LongTailClassifier) -> FittedCalibration:
    """Rescale, fit the calibrations of the recipe, and store the one to serve. The test part is not looked at.

    The scalar is selected by the likelihood of held-out images under the class prior that the logits are trained for;
    everything after it by class-balanced likelihood, since calibrated probabilities are for the balanced prior, and the
    temperature again for each prior that they may be shifted to, since under it other classes determine the right
    confidence. `calibrate.method = "auto"` fits several and takes the one that does best on held-out images that its
    fit has not seen (`camcal.training.calibration.methods`).

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

    MARC's margins are fitted again. Scalar, lean, temperatures and margins of held-out images are those of `first`,
    which were found for the first network of the same recipe. Raises as `calibrate` does.
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
        self._rescale()
        methods = Methods(self.recipe, self._held_out())
        names = wanted(self.recipe, self.learned_K, self.cache.counts_K, len(self.cache.held_labels))
        fits = [methods.fit(name) for name in names]
        chosen = choose(fits, self.weights_N.numpy())
        candidates = [self._candidate(fit, chosen) for fit in fits]
        return self._stored(candidates, fits.index(chosen))

    def take_over(self, first: FittedCalibration) -> FittedCalibration:
        if isinstance(self.network.head, WeightNormHead) and self.recipe.calibrate.scalar == "select":
            self.network.rescale.factor.fill_(first.scalar / self.network.head.scalar.item())
        candidates = [self._again(candidate) for candidate in first.candidates]
        served = [candidate.method for candidate in candidates].index(first.method)
        return self._stored(candidates, served, first.warnings)

    def _again(self, first: Candidate) -> Candidate:
        """A calibration of the first network for this one."""
        if first.method == "shrunk":
            return first
        omega_K, offset_K = Margins.none(self.cache.classes)
        if first.method == "marc":
            omega_K, offset_K = Methods(self.recipe, self._held_out()).marc_of_training()
        else:
            offset_K = -first.temperature * torch.from_numpy(np.log(self.learned_K * self.cache.classes)).float()
        offset_K = offset_K + lean_offset(first.lean, first.temperature, self.priors["train"])
        return first.model_copy(update={"omega": omega_K.tolist(), "offset": offset_K.tolist()})

    def _held_weights(self, prior_K: Floats) -> Tensor:
        """Weights under which the held-out images have these class frequencies."""
        return torch.from_numpy(prior_weights(self.cache.held_labels.numpy(), prior_K))

    def _held_out(self) -> FitData:
        """What calibrations are fitted to, of a network that is rescaled already."""
        cache, rescale = self.cache, Rescale(self.cache.classes)
        rescale.load_state_dict(self.network.rescale.state_dict())

        def training() -> tuple[Tensor, Tensor, NDArray[np.int64]]:
            return rescale(cache.train_NK), cache.train_labels, cache.counts_K

        return FitData(
            held_NK=rescale(cache.held_NK),
            held_labels_N=cache.held_labels,
            prior_K=self.learned_K if self.recipe.calibrate.rescale == "off" else self.even_K,
            weight_norms_K=self.network.weight_norms().detach().cpu(),
            train_prior_K=self.priors["train"],
            training=training,
        )

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

    def _candidate(self, fit: Fit, chosen: Fit) -> Candidate:
        """A fit with its temperatures for the other priors, beside the chosen one."""
        known, weights_N = len(fit.losses_N) > 0, self.weights_N.numpy()
        apart = crossfit.difference(fit.losses_N, chosen.losses_N, weights_N) if known else None
        return Candidate(
            method=fit.method,
            numbers=fit.numbers,
            nll=fit.nll,
            loss=float(weights_N @ fit.losses_N / weights_N.sum()) if known else None,
            difference=apart and apart.mean,
            standard_error=apart and apart.error,
            lean=fit.lean,
            penalty=fit.penalty,
            temperature=fit.temperature,
            prior_temperatures={
                name: fit_temperature(fit.unseen_NK, self.cache.held_labels, prior_K, self.recipe.calibrate.spread)
                for name, prior_K in self.priors.items()
            },
            omega=fit.margins.omega_K.tolist(),
            offset=fit.margins.offset_K.tolist(),
        )

    def _stored(self, candidates: list[Candidate], served: int, warnings: list[str] | None = None) -> FittedCalibration:
        """Put one of the calibrations into the network."""
        network, chosen = self.network, candidates[served]
        with torch.no_grad():
            network.marc.omega.copy_(torch.tensor(chosen.omega))
            network.marc.beta.copy_(torch.tensor(chosen.offset).to(network.mean.device) / network.weight_norms())
            network.temperature.fill_(chosen.temperature)
        _check_finite(network, self.cache.held_NK)
        if warnings is None:
            held = len(self.cache.held_labels)
            warnings = _warnings(self.recipe, chosen, self.learned_K, self.cache.counts_K, held)
        return FittedCalibration(
            trained_scalar=network.head.scalar.item(),
            scalar=network.scalar,
            method=chosen.method,
            candidates=candidates,
            lean=chosen.lean,
            tau=self.tau,
            tau_curve=self.tau_curve,
            temperature=chosen.temperature,
            prior_temperatures=chosen.prior_temperatures,
            logit_prior=self.learned_K.tolist(),
            penalty=chosen.penalty,
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


def _warnings(recipe: Recipe, chosen: Candidate, prior_K: Floats, counts_K: NDArray[np.int64], held: int) -> list[str]:
    warnings = []
    if held < FEW_HELD:
        warnings.append(
            f"only {held} images are held out, so scalar and temperature are rough estimates; more images, or a larger "
            "data.holdout_fraction, improve them"
        )
    if (turned := balanced_twice(prior_K, counts_K)) is not None:
        warnings.append(turned)
    elif chosen.method == "marc" and is_balanced(prior_K, counts_K):
        warnings.append(
            "the loss or the sampler balances the classes already; MARC on top may cost accuracy: compare with "
            "--set calibrate.method=auto"
        )
    elif chosen.method == "marc" and recipe.calibrate.rescale != "off":
        warnings.append(f"MARC on top of calibrate.rescale = {recipe.calibrate.rescale!r} balances the classes twice")
    if recipe.loss.smoothing and chosen.method == "temperature":
        warnings.append(
            "loss.smoothing brings the logits of common and rare classes closer than the class prior implies: "
            "subtracting the logarithm of the prior then favours rare classes; --set calibrate.method=lean corrects it"
        )
    return warnings
