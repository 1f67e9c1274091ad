"""The report: figures of a calibrated network on the test part, before and after each step."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.bundle import GROUPS, group_of
from camcal.models.classifier import LongTailClassifier
from camcal.models.normalized import WeightNormHead
from camcal.models.report import (
    Candidate,
    CandidateFigures,
    ClassFigures,
    Confusion,
    CurvePoint,
    DataSummary,
    Figures,
    FittedCalibration,
    GroupCalibration,
    PriorStep,
    RankGroups,
    Report,
    Step,
    TemperatureOnly,
    WorstClass,
)
from camcal.training import metrics
from camcal.training.calibration.calibrate import other_priors
from camcal.training.calibration.logits import TrainedLogits
from camcal.training.calibration.temperature import fit_temperature, lean_offset
from camcal.training.fitting.learned_prior import logit_prior
from camcal.training.metrics import Floats
from camcal.training.priors import even_prior, prior_weights, shift_prior
from camcal.training.provenance import made_with
from camcal.training.report.curves import scalar_curve, scalars_around
from camcal.training.run import Run

WORST = 12
"""Number of hardest classes in the report."""


def evaluate(
    run: Run,
    network: LongTailClassifier,
    fitted: FittedCalibration,
    before_refit: LongTailClassifier | None = None,
) -> Report:
    """The whole report, except for what trained the network. Only here is the test part looked at.

    Args:
        run: trained logits are kept in its folder.
        fitted: the calibration of the network.
        before_refit: where `network` was trained on held-out images as well, the one that was not; figures of held-out
            images are from it.
    """
    return _Evaluation(run, network.eval(), fitted, before_refit).report()


class _Part:
    """Test or held-out images: labels N, and the logits after each step of calibration, N×K.

    Args:
        raw_prior_K: the class prior that the trained logits are for.
        rescaled: whether τ-norm or learned weight scaling, which are chosen to balance the classes, gave the logits of
            the step `scalar`.
    """

    def __init__(self, labels: Tensor, logits: dict[Step, Tensor], raw_prior_K: Floats, rescaled: bool) -> None:
        self.labels, self.logits = labels, logits
        self.labels_N: NDArray[np.int64] = labels.numpy()
        self.raw_prior_K = raw_prior_K
        even_K = even_prior(len(raw_prior_K))
        self.prior_of: dict[Step, Floats] = {
            "trained": raw_prior_K,
            "scalar": even_K if rescaled else raw_prior_K,
            "adjusted": even_K,
        }


class _Evaluation:
    """The sections of the report, and the probabilities that they are made from."""

    def __init__(
        self,
        run: Run,
        network: LongTailClassifier,
        fitted: FittedCalibration,
        before_refit: LongTailClassifier | None,
    ) -> None:
        recipe, data, kept = run.recipe, run.data, run.folder.logits
        self.network, self.data, self.recipe, self.fitted = network, data, recipe, fitted
        self.counts_K = data.train_counts()
        self.groups_K: list[str] = [group_of(int(count)) for count in self.counts_K]
        self.priors = other_priors(recipe, data)
        self.even_K, self.train_K = even_prior(len(self.counts_K)), self.priors["train"]
        seen_K = np.bincount(data.train.labels.cpu().numpy(), minlength=len(self.counts_K))
        held_prior_K = logit_prior(recipe, seen_K)
        raw_prior_K = held_prior_K if before_refit is None else logit_prior(recipe, self.counts_K)
        trained = TrainedLogits(network, kept)
        self.test = self._part(network, data.test.labels, trained.test(data), raw_prior_K)
        # Held-out figures need a network that has not seen those images.
        unseen = trained if before_refit is None else TrainedLogits(before_refit.eval(), kept)
        self.held = self._part(unseen.network, data.holdout.labels, unseen.holdout(data), held_prior_K)
        self.held_scalar = unseen.network.scalar
        self.probabilities = {step: metrics.softmax(z.numpy()) for step, z in self.test.logits.items()}
        self.even_N = prior_weights(self.test.labels_N, self.even_K)
        self.train_N = prior_weights(self.test.labels_N, self.train_K)

    def _part(self, network: LongTailClassifier, labels: Tensor, trained_NK: Tensor, raw_prior_K: Floats) -> _Part:
        rescaled = self.recipe.calibrate.rescale != "off"
        logits = _steps(network, trained_NK, raw_prior_K)
        if self.fitted.method in ("temperature", "lean"):
            logits["marc"] = logits["scalar" if rescaled else "adjusted"]
        elif self.fitted.method == "marc":  # the lean comes after it
            logits["marc"] -= lean_offset(self.fitted.lean, network.temperature.item(), self.train_K)
        return _Part(labels, logits, raw_prior_K, rescaled)

    def report(self) -> Report:
        """All sections together."""
        under_train = self.under_train_prior
        return Report(
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            settings=self.recipe.shown(),
            made_with=made_with(self.network.mean.device),
            data=self._data(),
            test={step: self._figures(p, self.even_N) for step, p in self.probabilities.items()},
            test_under_train_prior={step: self._figures(p, self.train_N) for step, p in under_train.items()},
            effective_size=float(self.even_N.sum() ** 2 / (self.even_N**2).sum()),
            candidates={candidate.method: self._candidate(candidate) for candidate in self.fitted.candidates},
            temperature_only={
                "scalar": self._temperature_only("scalar"),
                "adjusted": self._temperature_only("adjusted"),
            },
            rank_groups=self._rank_groups(),
            by_predicted_group={
                "trained": self._by_predicted_group("trained"),
                "calibrated": self._by_predicted_group("calibrated"),
            },
            reliability={
                step: metrics.top_label_reliability(p, self.test.labels_N, self.even_N)
                for step, p in self.probabilities.items()
            },
            reliability_under_train_prior={
                step: metrics.top_label_reliability(p, self.test.labels_N, self.train_N)
                for step, p in under_train.items()
            },
            per_class=self._per_class(),
            worst_classes=self._worst_classes(),
            test_under_given_prior=self._under_given_prior(),
            scalar_curve=self._scalar_curve() if isinstance(self.network.head, WeightNormHead) else None,
            calibration=self.fitted,
            epochs=self.recipe.fit.epochs,
        )

    def _figures(self, probabilities_NK: Floats, weights_N: Floats) -> Figures:
        return metrics.figures(probabilities_NK, self.test.labels_N, self.groups_K, weights_N)

    def _data(self) -> DataSummary:
        data = self.data
        return DataSummary(
            classes=len(data.classes),
            train=len(data.train),
            holdout=len(data.holdout),
            test=len(data.test),
            largest_class=int(self.counts_K.max()),
            smallest_class=int(self.counts_K.min()),
            groups={group: self.groups_K.count(group) for group in GROUPS},
        )

    def _calibrated_for(self, prior: str) -> Floats:
        """Calibrated probabilities for another prior than the balanced one, with a temperature of their own."""
        served_NK = self.test.logits["calibrated"] * self.network.temperature.item()
        logits_NK = served_NK / self.fitted.prior_temperatures[prior]
        return shift_prior(metrics.softmax(logits_NK.numpy()), self.priors[prior])

    @cached_property
    def under_train_prior(self) -> dict[PriorStep, Floats]:
        """Probabilities for the training prior, N×K."""

        def shifted(step: Step) -> Floats:
            return shift_prior(self.probabilities[step], self.train_K / self.test.prior_of[step])

        return {
            "trained": shifted("trained"),
            "scalar": shifted("scalar"),
            "calibrated": self._calibrated_for("train"),
        }

    def _under_given_prior(self) -> dict[Literal["calibrated"], Figures] | None:
        if "given" not in self.priors:
            return None
        given_N = prior_weights(self.test.labels_N, self.priors["given"])
        return {"calibrated": self._figures(self._calibrated_for("given"), given_N)}

    def _candidate(self, candidate: Candidate) -> CandidateFigures:
        """Of another calibration of the network, which was not chosen or was."""
        logits_NK = torch.tensor(candidate.omega) * self.test.logits["scalar"] + torch.tensor(candidate.offset)
        balanced_NK = metrics.softmax((logits_NK / candidate.temperature).numpy())
        for_train_NK = metrics.softmax((logits_NK / candidate.prior_temperatures["train"]).numpy())
        return CandidateFigures(
            test=self._figures(balanced_NK, self.even_N),
            test_under_train_prior=self._figures(shift_prior(for_train_NK, self.train_K), self.train_N),
        )

    def _temperature_only(self, step: Step) -> TemperatureOnly:
        """Figures of a step with a temperature only, without margins.

        Fitted as after MARC: by class-balanced likelihood on the held-out part, and again for the training prior.
        """
        held_NK, logits_NK, spread = self.held.logits[step], self.test.logits[step], self.recipe.calibrate.spread
        balanced = fit_temperature(held_NK, self.held.labels, self.even_K, spread)
        shifted = fit_temperature(held_NK, self.held.labels, self.train_K, spread, self.held.prior_of[step])
        shifted_NK = metrics.softmax((logits_NK / shifted).numpy())
        return TemperatureOnly(
            temperature=balanced,
            test=self._figures(metrics.softmax((logits_NK / balanced).numpy()), self.even_N),
            test_under_train_prior=self._figures(
                shift_prior(shifted_NK, self.train_K / self.test.prior_of[step]), self.train_N
            ),
        )

    def _accuracy_of_each(self, step: Step) -> Floats:
        return metrics.per_class_accuracy(self.probabilities[step], self.test.labels_N)

    def _rank_groups(self) -> RankGroups:
        ranks_K = metrics.rank_groups(self.counts_K)
        return RankGroups(
            sizes={group: ranks_K.count(group) for group in metrics.RANK_GROUPS},
            test={
                step: metrics.group_accuracy(self._accuracy_of_each(step), ranks_K, metrics.RANK_GROUPS)
                for step in self.probabilities
            },
        )

    def _by_predicted_group(self, step: Step) -> dict[str, GroupCalibration | None]:
        return by_predicted_group(self.probabilities[step], self.test.labels_N, self.counts_K, self.even_N)

    def _margins(self, step: Step) -> tuple[Floats, Floats]:
        """Mean and spread over each class's samples of their margin for it, d_y = z_y/‖W_y‖ (MARC, 2112.07225)."""
        labels_N, norms_K = self.test.labels_N, self.network.weight_norms().detach().cpu()
        margins_NK = (self.test.logits[step] / norms_K).double().numpy()
        return metrics.per_class_spread(margins_NK[np.arange(len(labels_N)), labels_N], labels_N, len(norms_K))

    def _per_class(self) -> list[ClassFigures]:
        columns: dict[str, Floats] = {}
        margins: tuple[tuple[Step, Step], ...] = (("trained", "scalar"), ("calibrated", "marc"))
        for name, step in margins:
            mean_K, spread_K = self._margins(step)
            accuracy_K = self._accuracy_of_each(name)
            columns |= {f"accuracy_{name}": accuracy_K, f"margin_{name}": mean_K, f"margin_spread_{name}": spread_K}
        tested_K = np.bincount(self.test.labels_N, minlength=len(self.counts_K))
        return [
            ClassFigures(
                name=name,
                train_count=int(self.counts_K[k]),
                test_count=int(tested_K[k]),
                group=self.groups_K[k],
                **{column: None if np.isnan(v[k]) else round(float(v[k]), 4) for column, v in columns.items()},
            )
            for k, name in enumerate(self.data.classes)
        ]

    def _worst_classes(self) -> list[WorstClass]:
        labels_N, classes = self.test.labels_N, self.data.classes
        predicted_N = self.probabilities["calibrated"].argmax(axis=1)
        accuracy_K = self._accuracy_of_each("calibrated")
        order = [int(k) for k in np.argsort(accuracy_K, kind="stable") if accuracy_K[k] < 1]
        return [
            WorstClass(
                name=classes[k],
                accuracy=round(float(accuracy_K[k]), 4),
                taken_for=[
                    Confusion(name=classes[other], share=round(share, 4))
                    for other, share in metrics.taken_for(predicted_N, labels_N, k)
                ],
            )
            for k in order[:WORST]
        ]

    def _scalar_curve(self) -> list[CurvePoint]:
        """`scalar_curve` of the test part and of the held-out part, both class-balanced."""
        scalars = scalars_around(float(self.network.scalar))
        curves = []
        for part, scalar in ((self.test, self.network.scalar), (self.held, self.held_scalar)):
            cosines_NK = (part.logits["scalar"] / scalar).double().numpy()
            weights_N = prior_weights(part.labels_N, self.even_K)
            curves.append(scalar_curve(cosines_NK, part.labels_N, weights_N, part.raw_prior_K, scalars))
        return [
            CurvePoint(**test, **{f"holdout_{name}": value for name, value in held.items() if name != "scalar"})
            for test, held in zip(*curves, strict=True)
        ]


def _steps(network: LongTailClassifier, trained_NK: Tensor, raw_prior_K: Floats) -> dict[Step, Tensor]:
    """The logits after each step of a network's calibration, N×K."""
    with torch.no_grad():
        logits_NK = network.rescale(trained_NK.to(network.mean.device)).cpu()
        served_NK = network.calibrate(logits_NK.to(network.mean.device)).cpu()
    return {
        "trained": trained_NK,
        "adjusted": network.rescale.factor.cpu() * trained_NK - torch.from_numpy(np.log(raw_prior_K)),
        "scalar": logits_NK,
        "marc": served_NK,
        "calibrated": served_NK / network.temperature.item(),
    }


def by_predicted_group(
    probabilities_NK: Floats, labels_N: NDArray[np.int64], counts_K: NDArray[np.int64], weights_N: Floats
) -> dict[str, GroupCalibration | None]:
    """`metrics.calibration_by_group`, with groups by count and by rank."""
    by_count: list[str] = [group_of(int(count)) for count in counts_K]
    by_rank = metrics.rank_groups(counts_K)
    return metrics.calibration_by_group(probabilities_NK, labels_N, by_count, weights_N) | metrics.calibration_by_group(
        probabilities_NK, labels_N, by_rank, weights_N, metrics.RANK_GROUPS
    )
