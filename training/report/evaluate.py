"""The report: honest figures of a calibrated network on the test part, before and after each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.bundle import GROUPS, group_of
from camcal.models.classifier import LongTailClassifier
from camcal.models.normalized import WeightNormHead
from camcal.training import metrics
from camcal.training.calibration.calibrate import other_priors
from camcal.training.calibration.logits import TrainedLogits
from camcal.training.calibration.temperature import fit_temperature, lean_offset
from camcal.training.data import Dataset
from camcal.training.fitting.learned_prior import logit_prior
from camcal.training.priors import even_prior, prior_weights, shift_prior
from camcal.training.provenance import made_with
from camcal.training.recipe import Recipe
from camcal.training.report.curves import scalar_curve, scalars_around

WORST = 12
"""How many of the hardest classes the report names, with what they are mistaken for."""


def evaluate(
    network: LongTailClassifier,
    data: Dataset,
    recipe: Recipe,
    temperatures: Mapping[str, float],
    lean: float = 0.0,
    before_refit: LongTailClassifier | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Everything the report holds, ready for JSON. This is the only place where the test part is looked at.

    The step `adjusted` stands beside the others: the trained logits with the selected scalar and the logarithm of their
    class prior taken from them, nothing else; logit adjustment afterwards.

    Args:
        temperatures: `Fitted.prior_temperatures`.
        lean: `Fitted.lean`.
        before_refit: where `network` was trained on held-out images as well, the one that was not; what is said of
            held-out images is said of it.
        kept: a file for the trained logits, see `TrainedLogits`.
    """
    counts_K = data.train_counts()
    groups_K: list[str] = [group_of(int(count)) for count in counts_K]
    labels_N = data.test.labels.numpy()
    tested_K = np.bincount(labels_N, minlength=len(counts_K))
    held_prior_K = logit_prior(recipe, np.bincount(data.train.labels.cpu().numpy(), minlength=len(counts_K)))
    raw_prior_K = held_prior_K if before_refit is None else logit_prior(recipe, counts_K)
    even_K = even_prior(len(raw_prior_K))
    # τ-norm and learned weight scaling are chosen to balance the classes: their logits are for the even prior.
    balanced = recipe.calibrate.rescale != "off"
    step_priors = {"trained": raw_prior_K, "scalar": even_K if balanced else raw_prior_K, "adjusted": even_K}
    held_priors = {"scalar": even_K if balanced else held_prior_K, "adjusted": even_K}
    trained = TrainedLogits(network.eval(), kept)
    priors = other_priors(recipe, data)
    prior_K = priors["train"]
    offset_K = lean_offset(lean, network.temperature.item(), prior_K)
    logits = _steps(network, trained.test(data), raw_prior_K, offset_K)
    unseen = trained if before_refit is None else TrainedLogits(before_refit.eval(), kept)
    unseeing = unseen.network
    held = _steps(unseeing, unseen.holdout(data), held_prior_K, offset_K)
    probabilities = {step: metrics.softmax(z.numpy()) for step, z in logits.items()}
    even_N, weights_N = prior_weights(labels_N, even_K), prior_weights(labels_N, prior_K)
    under_prior = {
        step: shift_prior(probabilities[step], prior_K / step_priors[step]) for step in ("trained", "scalar")
    }
    for_prior = {
        name: shift_prior(metrics.softmax(((logits["marc"] + offset_K) / temperatures[name]).numpy()), wanted_K)
        for name, wanted_K in priors.items()
    }
    under_prior["calibrated"] = for_prior["train"]
    report = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "settings": recipe.shown(),
        "made_with": made_with(network.mean.device),
        "data": {
            "classes": len(data.classes),
            "train": len(data.train),
            "holdout": len(data.holdout),
            "test": len(data.test),
            "largest_class": int(counts_K.max()),
            "smallest_class": int(counts_K.min()),
            "groups": {group: groups_K.count(group) for group in GROUPS},
        },
        "test": {step: metrics.figures(p, labels_N, groups_K, even_N) for step, p in probabilities.items()},
        "test_under_train_prior": {
            step: metrics.figures(p, labels_N, groups_K, weights_N) for step, p in under_prior.items()
        },
        "by_chance": {
            "samples": float(even_N.sum() ** 2 / (even_N**2).sum()),
            "ece": metrics.chance_calibration_error(probabilities["calibrated"], even_N),
        },
        "temperature_only": {
            step: _temperature_only(
                data,
                held[step],
                logits[step],
                (held_prior, step_priors[step]),
                prior_K,
                recipe.calibrate.spread,
                groups_K,
            )
            for step, held_prior in held_priors.items()
        },
        "rank_groups": _rank_groups(counts_K, probabilities, labels_N),
        "by_predicted_group": {
            step: by_predicted_group(probabilities[step], labels_N, counts_K, even_N)
            for step in ("trained", "calibrated")
        },
        "reliability": {step: metrics.top_label_reliability(p, labels_N, even_N) for step, p in probabilities.items()},
        "reliability_under_train_prior": {
            step: metrics.top_label_reliability(p, labels_N, weights_N) for step, p in under_prior.items()
        },
        "per_class": _per_class(data, counts_K, tested_K, probabilities, _margins(network, logits, labels_N)),
        "worst_classes": _worst_classes(data, probabilities["calibrated"]),
    }
    if "given" in priors:
        given_N = prior_weights(labels_N, priors["given"])
        report["test_under_given_prior"] = {
            "calibrated": metrics.figures(for_prior["given"], labels_N, groups_K, given_N)
        }
    if isinstance(network.head, WeightNormHead):
        report["scalar_curve"] = _scalar_curve(
            data,
            logits["scalar"] / network.scalar,
            held["scalar"] / unseeing.scalar,
            (raw_prior_K, held_prior_K),
            scalars_around(float(network.scalar)),
        )
    return report


def _steps(
    network: LongTailClassifier,
    trained_NK: Tensor,
    raw_prior_K: metrics.Floats,
    offset_K: Tensor,
) -> dict[str, Tensor]:
    """The logits after each step of a network's calibration, N×K.

    Args:
        offset_K: what the lean has added to what the network serves; it comes after `marc`.
    """
    with torch.no_grad():
        logits_NK = network.rescale(trained_NK.to(network.mean.device)).cpu()
        served_NK = network.calibrate(logits_NK.to(network.mean.device)).cpu()
    return {
        "trained": trained_NK,
        "adjusted": network.rescale.factor.cpu() * trained_NK - torch.from_numpy(np.log(raw_prior_K)),
        "scalar": logits_NK,
        "marc": served_NK - offset_K,
        "calibrated": served_NK / network.temperature.item(),
    }


def _margins(
    network: LongTailClassifier, logits: dict[str, Tensor], labels_N: NDArray[np.int64]
) -> dict[str, tuple[metrics.Floats, metrics.Floats]]:
    """Mean and spread over each class's samples of their margin for it, d_y = z_y/‖W_y‖ (MARC, arXiv 2112.07225)."""
    norms_K = network.weight_norms().detach().cpu()
    result = {}
    for name, step in (("trained", "scalar"), ("calibrated", "marc")):
        margins_NK = (logits[step] / norms_K).double().numpy()
        own_N = margins_NK[np.arange(len(labels_N)), labels_N]
        result[name] = metrics.per_class_spread(own_N, labels_N, len(norms_K))
    return result


def _temperature_only(
    data: Dataset,
    held_NK: Tensor,
    logits_NK: Tensor,
    raw_priors_K: tuple[metrics.Floats, metrics.Floats],
    prior_K: metrics.Floats,
    spread: float,
    groups_K: list[str],
) -> dict[str, Any]:
    """What a temperature makes of held-out and test logits, each for a class prior q of their own, without MARC.

    Fitted as after MARC, by class-balanced likelihood on the held-out part, and once more for the training prior π.
    """
    labels_N, held_labels = data.test.labels.numpy(), data.holdout.labels
    even_K = even_prior(len(prior_K))
    balanced = fit_temperature(held_NK, held_labels, even_K, spread)
    shifted = fit_temperature(held_NK, held_labels, prior_K, spread, raw_priors_K[0])
    shifted_NK = shift_prior(metrics.softmax((logits_NK / shifted).numpy()), prior_K / raw_priors_K[1])
    return {
        "temperature": balanced,
        "test": metrics.figures(
            metrics.softmax((logits_NK / balanced).numpy()), labels_N, groups_K, prior_weights(labels_N, even_K)
        ),
        "test_under_train_prior": metrics.figures(shifted_NK, labels_N, groups_K, prior_weights(labels_N, prior_K)),
    }


def _rank_groups(
    counts_K: NDArray[np.int64], probabilities: dict[str, metrics.Floats], labels_N: NDArray[np.int64]
) -> dict[str, Any]:
    ranks_K = metrics.rank_groups(counts_K)
    return {
        "sizes": {group: ranks_K.count(group) for group in metrics.RANK_GROUPS},
        "test": {
            step: metrics.group_accuracy(metrics.per_class_accuracy(p, labels_N), ranks_K, metrics.RANK_GROUPS)
            for step, p in probabilities.items()
        },
    }


def by_predicted_group(
    probabilities_NK: metrics.Floats,
    labels_N: NDArray[np.int64],
    counts_K: NDArray[np.int64],
    weights_N: metrics.Floats,
) -> dict[str, metrics.GroupCalibration | None]:
    """`metrics.calibration_by_group`, with groups by count and by rank."""
    by_count: list[str] = [group_of(int(count)) for count in counts_K]
    by_rank = metrics.rank_groups(counts_K)
    return metrics.calibration_by_group(probabilities_NK, labels_N, by_count, weights_N) | metrics.calibration_by_group(
        probabilities_NK, labels_N, by_rank, weights_N, metrics.RANK_GROUPS
    )


def _scalar_curve(
    data: Dataset,
    cosines_NK: Tensor,
    held_cosines_NK: Tensor,
    raw_priors_K: tuple[metrics.Floats, metrics.Floats],
    scalars: Sequence[float],
) -> list[dict[str, float]]:
    """`scalar_curve` of the test part, and of the held-out part under the names `holdout_…`, class-balanced both."""
    even_K = even_prior(len(data.classes))
    curves = []
    parts = (data.test, cosines_NK), (data.holdout, held_cosines_NK)
    for (part, c_NK), raw_prior_K in zip(parts, raw_priors_K, strict=True):
        labels_N = part.labels.numpy()
        weights_N = prior_weights(labels_N, even_K)
        curves.append(scalar_curve(c_NK.double().numpy(), labels_N, weights_N, raw_prior_K, scalars))
    return [
        test | {f"holdout_{name}": value for name, value in held.items() if name != "scalar"}
        for test, held in zip(*curves, strict=True)
    ]


def _per_class(
    data: Dataset,
    counts_K: NDArray[np.int64],
    tested_K: NDArray[np.int64],
    probabilities: dict[str, metrics.Floats],
    margins: dict[str, tuple[metrics.Floats, metrics.Floats]],
) -> list[dict[str, Any]]:
    columns: dict[str, metrics.Floats] = {}
    for step, (mean_K, spread_K) in margins.items():
        columns[f"accuracy_{step}"] = metrics.per_class_accuracy(probabilities[step], data.test.labels.numpy())
        columns |= {f"margin_{step}": mean_K, f"margin_spread_{step}": spread_K}
    return [
        {
            "class": name,
            "train_count": int(counts_K[k]),
            "test_count": int(tested_K[k]),
            "group": group_of(int(counts_K[k])),
        }
        | {column: None if np.isnan(v[k]) else round(float(v[k]), 4) for column, v in columns.items()}
        for k, name in enumerate(data.classes)
    ]


def _worst_classes(data: Dataset, probabilities_NK: metrics.Floats) -> list[dict[str, Any]]:
    """The classes with the lowest accuracy, and what they are most often taken for."""
    labels_N, predicted_N = data.test.labels.numpy(), probabilities_NK.argmax(axis=1)
    accuracy_K = metrics.per_class_accuracy(probabilities_NK, labels_N)
    order = [int(k) for k in np.argsort(accuracy_K, kind="stable") if accuracy_K[k] < 1]
    return [
        {
            "class": data.classes[k],
            "accuracy": round(float(accuracy_K[k]), 4),
            "taken_for": [
                {"class": data.classes[c["label"]], "share": round(c["share"], 4)}
                for c in metrics.taken_for(predicted_N, labels_N, k)
            ],
        }
        for k in order[:WORST]
    ]
