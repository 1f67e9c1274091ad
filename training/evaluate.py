"""The report: honest figures of a calibrated network on the test part, before and after each step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.bundle import GROUPS, group_of
from models.classifier import LongTailClassifier
from models.normalized import WeightNormHead
from training import metrics
from training.calibrate import fit_temperature, other_priors
from training.config import Recipe
from training.curves import scalar_curve, scalars_around
from training.data import Dataset
from training.logits import TrainedLogits
from training.priors import even_prior, logit_prior, prior_weights, shift_prior
from training.provenance import made_with

_RESCALED = {"off": "+ scalar", "tau": "+ τ-norm", "lws": "+ weight scaling"}
WORST = 12
"""How many classes the report names at most: the hardest with what they are mistaken for, and those without a test."""


def evaluate(
    network: LongTailClassifier,
    data: Dataset,
    recipe: Recipe,
    temperatures: Mapping[str, float],
    before_refit: LongTailClassifier | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Everything the report holds, ready for JSON. This is the only place where the test part is looked at.

    The step `adjusted` stands beside the others: the trained logits with the selected scalar and the logarithm of their
    class prior taken from them, nothing else; logit adjustment afterwards.

    Args:
        temperatures: `Fitted.prior_temperatures`.
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
    logits = _steps(network, trained.test(data), raw_prior_K)
    unseen = trained if before_refit is None else TrainedLogits(before_refit.eval(), kept)
    unseeing = unseen.network
    held = _steps(unseeing, unseen.holdout(data), held_prior_K)
    probabilities = {step: metrics.softmax(z.numpy()) for step, z in logits.items()}
    priors = other_priors(recipe, data)
    prior_K = priors["train"]
    even_N, weights_N = prior_weights(labels_N, even_K), prior_weights(labels_N, prior_K)
    under_prior = {
        step: shift_prior(probabilities[step], prior_K / step_priors[step]) for step in ("trained", "scalar")
    }
    for_prior = {
        name: shift_prior(metrics.softmax((logits["marc"] / temperatures[name]).numpy()), wanted_K)
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


def _steps(network: LongTailClassifier, trained_NK: Tensor, raw_prior_K: metrics.Floats) -> dict[str, Tensor]:
    """The logits after each step of a network's calibration, N×K."""
    with torch.no_grad():
        logits_NK = network.rescale(trained_NK.to(network.mean.device)).cpu()
        marc_NK = network.calibrate(logits_NK.to(network.mean.device)).cpu()
    return {
        "trained": trained_NK,
        "adjusted": network.rescale.factor.cpu() * trained_NK - torch.from_numpy(np.log(raw_prior_K)),
        "scalar": logits_NK,
        "marc": marc_NK,
        "calibrated": marc_NK / network.temperature.item(),
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


def steps_taken(report: dict[str, Any]) -> dict[str, str]:
    """The steps from the trained network to the served probabilities, each with the name that tables give it.

    One that changed nothing is left out, such as the scalar of a linear head. Without MARC, its place is that of the
    prior taken out.
    """
    settings = report["settings"]["calibrate"]
    names = {
        "trained": "as trained",
        "scalar": _RESCALED[settings["rescale"]],
        "marc": "+ MARC" if settings["marc"] else "− log prior",
        "calibrated": "+ temperature",
    }
    nll = {step: report["test"][step]["nll"] for step in names}
    same = {
        after
        for before, after in itertools.pairwise(["trained", "scalar", "marc"])
        if math.isclose(nll[before], nll[after], rel_tol=1e-6)
    }
    return {step: name for step, name in names.items() if step not in same}


def steps_for_prior(report: dict[str, Any]) -> dict[str, str]:
    """The same for another prior than the balanced one, where all of calibration is one step."""
    names = steps_taken(report)
    names["calibrated"] = "+ MARC, temperature" if names.pop("marc", "") == "+ MARC" else "+ temperature"
    return names


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report's main figures as two tables; all but NLL and Brier score are in percent."""
    d = report["data"]
    console.print(
        f"{report['recipe']}: {d['classes']} classes, {d['train'] + d['holdout']} training images "
        f"({d['largest_class']} to {d['smallest_class']} a class), {d['holdout']} of them held out"
        f"{' at first' if report['settings']['calibrate']['refit'] else ''}, {d['test']} for the test"
    )
    balanced = {name: report["test"][step] for step, name in steps_taken(report).items()}
    if report["settings"]["calibrate"]["marc"]:
        balanced["− log prior alone"] = report["test"]["adjusted"]
    console.print(figures_table("test weighted evenly over the classes, balanced prior", d["groups"], balanced))
    for words in reservations(report):
        console.print(words)
    names = steps_for_prior(report)
    under_train = {name: report["test_under_train_prior"][step] for step, name in names.items()}
    console.print(figures_table("test weighted to the training frequencies, training prior", d["groups"], under_train))
    if given := report.get("test_under_given_prior"):
        under_given = {names[step]: figures for step, figures in given.items()}
        console.print(figures_table("test weighted to the given prior, probabilities for it", d["groups"], under_given))


def reservations(report: dict[str, Any]) -> list[str]:
    """Sentences about what the test part is too small to show; none where it is large enough."""
    found = []
    untested = [row["class"] for row in report["per_class"] if row["accuracy_trained"] is None]
    if untested:
        shown = ", ".join(untested[:WORST]) + (", …" if len(untested) > WORST else "")
        found.append(f"No figure counts the classes without a test image ({len(untested)}): {shown}.")
    chance = report.get("by_chance")  # absent from older reports
    if chance and chance["ece"] > report["test"]["calibrated"]["ece"] / 2:
        found.append(
            f"The test images tell as much as {chance['samples']:.0f} of equal weight would: perfect probabilities "
            f"would show an ECE of {100 * chance['ece']:.1f} % on them by chance."
        )
    return found


def figures_table(title: str, groups: dict[str, int], rows: dict[str, dict[str, Any]]) -> Table:
    """Figures by row; all but NLL and Brier score are in percent. `groups` says how many classes each has."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for name in ("top-1", *(f"{group} ({groups[group]})" for group in GROUPS), "ECE", "cwECE", "NLL", "Brier"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in rows.items():
        table.add_row(name, *_row(figures))
    return table


def _row(f: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}"

    parts = [percent(f["accuracy"]), *(percent(f["groups"][group]) for group in GROUPS)]
    return [*parts, percent(f["ece"]), f"{100 * f['classwise_ece']:.2f}", f"{f['nll']:.3f}", f"{f['brier']:.3f}"]
