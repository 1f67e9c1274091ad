"""The report: honest figures of a calibrated network on the test part, before and after each step."""

from __future__ import annotations

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
from training.calibrate import predict_logits
from training.config import Recipe
from training.curves import scalar_curve
from training.data import Dataset
from training.priors import given_prior, logit_prior, prior_weights, shift_prior

STEPS = {
    "trained": "as trained",
    "adjusted": "- log prior",
    "scalar": "+ scalar",
    "marc": "+ MARC",
    "calibrated": "+ temperature",
}


def evaluate(network: LongTailClassifier, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """Everything the report holds, ready for JSON. This is the only place where the test part is looked at.

    The step `adjusted` stands beside the others: the trained logits with the selected scalar and the logarithm of their
    class prior taken from them, nothing else; logit adjustment afterwards.
    """
    counts_K = data.train_counts()
    groups_K = [group_of(int(count)) for count in counts_K]
    labels_N = data.test.labels.numpy()
    raw_prior_K = logit_prior(recipe, np.bincount(data.train.labels.cpu().numpy(), minlength=len(counts_K)))
    logits_NK = predict_logits(network.eval(), data.test)
    probabilities = _probabilities(network, logits_NK, raw_prior_K)
    prior_K = counts_K / counts_K.sum()
    weights_N = prior_weights(labels_N, prior_K)
    report = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "data": {
            "classes": len(data.classes),
            "train": len(data.train),
            "holdout": len(data.holdout),
            "test": len(data.test),
            "largest_class": int(counts_K.max()),
            "smallest_class": int(counts_K.min()),
            "groups": {group: groups_K.count(group) for group in GROUPS},
        },
        "test": {step: metrics.figures(p, labels_N, list(groups_K)) for step, p in probabilities.items()},
        "test_under_train_prior": {
            "trained": metrics.figures(
                shift_prior(probabilities["trained"], prior_K / raw_prior_K), labels_N, list(groups_K), weights_N
            ),
            "calibrated": metrics.figures(
                shift_prior(probabilities["calibrated"], prior_K), labels_N, list(groups_K), weights_N
            ),
        },
        "reliability": {
            step: metrics.top_label_reliability(probabilities[step], labels_N, np.ones(len(labels_N)))
            for step in ("trained", "calibrated")
        },
        "per_class": _per_class(data, counts_K, probabilities, labels_N),
    }
    if recipe.calibrate.prior is not None:
        given_K = given_prior(recipe.calibrate.prior, data.classes)
        report["test_under_given_prior"] = {
            "calibrated": metrics.figures(
                shift_prior(probabilities["calibrated"], given_K),
                labels_N,
                list(groups_K),
                prior_weights(labels_N, given_K),
            )
        }
    if isinstance(network.head, WeightNormHead):
        report["scalar_curve"] = _scalar_curve(network, logits_NK, data, raw_prior_K)
    return report


def _probabilities(
    network: LongTailClassifier, logits_NK: Tensor, raw_prior_K: metrics.Floats
) -> dict[str, metrics.Floats]:
    with torch.no_grad():
        trained_NK = network.rescale.undo(logits_NK)
        marc_NK = network.calibrate(logits_NK.to(network.mean.device)).cpu()
    logits = {
        "trained": trained_NK,
        "adjusted": network.rescale.factor.cpu() * trained_NK - torch.from_numpy(np.log(raw_prior_K)),
        "scalar": logits_NK,
        "marc": marc_NK,
        "calibrated": marc_NK / network.temperature.item(),
    }
    return {step: metrics.softmax(z.numpy()) for step, z in logits.items()}


def _scalar_curve(
    network: LongTailClassifier, logits_NK: Tensor, data: Dataset, raw_prior_K: metrics.Floats
) -> list[dict[str, float]]:
    """`scalar_curve` of the test part, and of the held-out part under the names `holdout_…`, class-balanced both."""
    balanced_K = np.full(len(data.classes), 1 / len(data.classes))
    curves = []
    for part, z_NK in ((data.test, logits_NK), (data.holdout, predict_logits(network, data.holdout))):
        labels_N = part.labels.numpy()
        cosines_NK = z_NK.double().numpy() / network.scalar
        curves.append(scalar_curve(cosines_NK, labels_N, prior_weights(labels_N, balanced_K), raw_prior_K))
    return [
        test | {f"holdout_{name}": value for name, value in held.items() if name != "scalar"}
        for test, held in zip(*curves, strict=True)
    ]


def _per_class(
    data: Dataset, counts_K: NDArray[np.int64], probabilities: dict[str, metrics.Floats], labels_N: NDArray[np.int64]
) -> list[dict[str, Any]]:
    columns = {step: metrics.per_class_accuracy(probabilities[step], labels_N) for step in ("trained", "calibrated")}
    return [
        {"class": name, "train_count": int(counts_K[k]), "group": group_of(int(counts_K[k]))}
        | {f"accuracy_{step}": None if np.isnan(v[k]) else round(float(v[k]), 4) for step, v in columns.items()}
        for k, name in enumerate(data.classes)
    ]


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report's main figures as two tables; all but NLL and Brier score are in percent."""
    d = report["data"]
    console.print(
        f"{report['recipe']}: {d['classes']} classes, {d['train']} training images ({d['largest_class']} to "
        f"{d['smallest_class']} a class, held-out ones included), {d['holdout']} held out, {d['test']} for the test"
    )
    balanced = {name: report["test"][step] for step, name in STEPS.items()}
    console.print(_table("balanced test, balanced prior", d["groups"], balanced))
    under_train = {STEPS[step]: figures for step, figures in report["test_under_train_prior"].items()}
    console.print(_table("test weighted to the training frequencies, training prior", d["groups"], under_train))


def _table(title: str, groups: dict[str, int], rows: dict[str, dict[str, Any]]) -> Table:
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
