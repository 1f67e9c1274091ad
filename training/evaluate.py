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
from training import metrics
from training.calibrate import fit_scale, predict_logits
from training.config import Recipe
from training.data import Dataset
from training.provenance import made_with

STEPS = {
    "trained": "as trained",
    "scalar": "+ scalar",
    "marc": "+ MARC",
    "calibrated": "+ temperature",
}
WORST = 12
"""How many classes the report lists with what they are mistaken for."""


def evaluate(network: LongTailClassifier, data: Dataset, recipe: Recipe, trained_scalar: float) -> dict[str, Any]:
    """Everything the report holds, ready for JSON. This is the only place where the test part is looked at.

    Args:
        trained_scalar: s as training left it, before its selection on held-out images.
    """
    counts_K = data.train_counts()
    groups_K: list[str] = [group_of(int(count)) for count in counts_K]
    labels_N = data.test.labels.numpy()
    logits = _logits(network, data, trained_scalar)
    probabilities = {step: metrics.softmax(z.numpy()) for step, z in logits.items()}
    prior_K = counts_K / counts_K.sum()
    weights_N = _prior_weights(labels_N, prior_K)
    under_prior = {step: probabilities[step] for step in ("trained", "scalar")}
    under_prior["calibrated"] = shift_prior(probabilities["calibrated"], prior_K)
    norms_K = network.head.weight_norms().detach().cpu()
    margins = {
        step: metrics.per_class_spread(_margins(logits[z], norms_K, labels_N), labels_N, len(counts_K))
        for step, z in (("trained", "scalar"), ("calibrated", "marc"))
    }
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "settings": recipe.model_dump(mode="json", exclude={"data": {"root"}}),
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
        "test": {step: metrics.figures(p, labels_N, groups_K) for step, p in probabilities.items()},
        "test_under_train_prior": {
            step: metrics.figures(p, labels_N, groups_K, weights_N) for step, p in under_prior.items()
        },
        "without_marc": _without_marc(network, data, logits["scalar"], groups_K),
        "rank_groups": _rank_groups(counts_K, probabilities, labels_N),
        "reliability": {
            step: metrics.top_label_reliability(p, labels_N, np.ones(len(labels_N)))
            for step, p in probabilities.items()
        },
        "reliability_under_train_prior": {
            step: metrics.top_label_reliability(p, labels_N, weights_N) for step, p in under_prior.items()
        },
        "per_class": _per_class(data, counts_K, probabilities, margins),
        "worst_classes": _worst_classes(data, probabilities["calibrated"]),
    }


def shift_prior(probabilities_NK: metrics.Floats, prior_K: metrics.Floats) -> metrics.Floats:
    """Probabilities for a balanced prior, turned into those for another: p_k·π_k, normalised."""
    shifted = probabilities_NK * prior_K
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


@torch.no_grad()
def _logits(network: LongTailClassifier, data: Dataset, trained_scalar: float) -> dict[str, Tensor]:
    """The logits of the test part after each step, N×K."""
    logits_NK = predict_logits(network.eval(), data.test)
    marc_NK = network.calibrate(logits_NK.to(network.mean.device)).cpu()
    return {
        "trained": logits_NK * (trained_scalar / network.head.scalar.item()),
        "scalar": logits_NK,
        "marc": marc_NK,
        "calibrated": marc_NK / network.temperature.item(),
    }


def _margins(logits_NK: Tensor, norms_K: Tensor, labels_N: NDArray[np.int64]) -> metrics.Floats:
    """Each sample's margin for its own class y, d_y = z_y/‖W_y‖ (MARC, arXiv 2112.07225), N values."""
    return np.asarray((logits_NK / norms_K).numpy()[np.arange(len(labels_N)), labels_N], dtype=np.float64)


def _without_marc(network: LongTailClassifier, data: Dataset, logits_NK: Tensor, groups_K: list[str]) -> dict[str, Any]:
    """What a temperature alone makes of the same network: fitted as after MARC, with MARC left out."""
    held_labels = data.holdout.labels
    weights_N = 1 / held_labels.bincount()[held_labels]
    temperature = 1 / fit_scale(predict_logits(network, data.holdout), held_labels, weights_N)
    probabilities_NK = metrics.softmax((logits_NK / temperature).numpy())
    return {
        "temperature": temperature,
        "test": metrics.figures(probabilities_NK, data.test.labels.numpy(), groups_K),
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


def _prior_weights(labels_N: NDArray[np.int64], prior_K: metrics.Floats) -> metrics.Floats:
    """Weights under which the test part has the class frequencies `prior_K`."""
    shares = np.bincount(labels_N, minlength=len(prior_K)) / len(labels_N)
    return np.asarray((prior_K / np.where(shares > 0, shares, 1))[labels_N])


def _per_class(
    data: Dataset,
    counts_K: NDArray[np.int64],
    probabilities: dict[str, metrics.Floats],
    margins: dict[str, tuple[metrics.Floats, metrics.Floats]],
) -> list[dict[str, Any]]:
    columns: dict[str, metrics.Floats] = {}
    for step, (mean_K, spread_K) in margins.items():
        columns[f"accuracy_{step}"] = metrics.per_class_accuracy(probabilities[step], data.test.labels.numpy())
        columns |= {f"margin_{step}": mean_K, f"margin_spread_{step}": spread_K}
    return [
        {"class": name, "train_count": int(counts_K[k]), "group": group_of(int(counts_K[k]))}
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
