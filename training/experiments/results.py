"""Results of runs: one small JSON per run, and the tables made from many. Nothing here needs torch.

One training gives a row as trained and further rows after calibration, all in one file under `rows`; what they share
(data set, recipe, seed, commit, hardware) is stored once. Accuracies and errors are fractions of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from camcal.models.report import Candidate, Figures, Report, Step
from camcal.training.recipe import MADE_TAILED, AugmentConfig
from camcal.training.report.summary import recipe_in

Row = dict[str, Any]

FOLDER = Path(__file__).with_name("published")
"""The results in docs/results, which an installation holds too."""
SETTING = ("dataset", "imbalance", "backbone", "epochs", "augmentation")
"""Rows are compared if these are equal."""

_DATASETS = {"cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT", "digits": "digits"}


class ResultsError(ValueError):
    """A missing folder of results, or a file in it that is not a result."""


Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _UnderPrior(_Strict):
    accuracy: Share
    ece: Share


class _Method(_Strict):
    """The part of a row that the tables need."""

    method: str
    accuracy: Share
    groups: dict[str, Share | None]
    rank_groups: dict[str, Share | None]
    ece: Share
    ece_calibrated: Share
    train_prior: _UnderPrior


class _ResultFile(_Strict):
    dataset: str
    imbalance: float
    backbone: str
    epochs: int
    augmentation: str
    seed: int
    commit: str | None
    hardware: str
    rows: list[_Method] = Field(min_length=1)


_FITTED_ON = {"train": [], "both": ["held-out too"]}


def result_of(report: Report, method: str, calibrated: str | None = None, *, plain: bool = True) -> Row:
    """The result file of a run, from its report.

    Args:
        method: the name of the network as trained. If its logits are for a class prior that is not uniform, the row
            `method + logit adjustment` has that prior subtracted afterwards.
        calibrated: its name after calibration: by default `method + auto`; `method + MARC`, `method + MARC, held-out
            too`, either with `, lean`; `method + shrunk margins`; `method + logit adjustment, lean` or, if the logits
            are for a uniform prior, `method + lean`. `calibrate.method = "temperature"` has no such row.
        plain: whether the file has the rows without it.
    """
    recipe, data = recipe_in(report), report.data
    source, calibrate = recipe.data.source, recipe.calibrate
    ratio = data.largest_class / data.smallest_class
    # Logits for a uniform prior (balanced softmax) have nothing to subtract; rescaled ones have lost the prior already.
    prior = report.calibration.logit_prior
    uneven = calibrate.rescale == "off" and max(prior) > (1 + 1e-6) * min(prior)
    rows = []
    if plain:
        rows.append(_plain_row(report, "scalar", method))
        if uneven:
            rows.append(_plain_row(report, "adjusted", f"{method} + logit adjustment"))
    if calibrate.method != "temperature":
        steps = {
            "auto": ["auto"],
            "lean": ["logit adjustment"] * uneven + ["lean"],
            "marc": ["MARC", *_FITTED_ON[calibrate.marc_on]] + ["lean"] * calibrate.marc_lean,
            "shrunk": ["shrunk margins"],
        }[calibrate.method]
        rows.append(_calibrated_row(report, calibrated or f"{method} + {', '.join(steps)}"))
    result = {
        "dataset": _DATASETS.get(source, report.recipe),
        "imbalance": recipe.data.imbalance if source in MADE_TAILED else round(ratio, 1),
        "backbone": recipe.model.backbone,
        "augmentation": describe_augmentation(recipe.augment),
        "epochs": report.epochs,
        "seed": report.seed,
        **report.made_with.model_dump(),
        # The training may have been on other hardware than its evaluation.
        "hardware": report.trained_with[-1].hardware,
        "trained_with": [made.model_dump() for made in report.trained_with],
        "rows": rows,
        "recipe": report.settings,
    }
    if len(report.calibration.candidates) > 1:
        result["candidates"] = [_candidate(report, each) for each in report.calibration.candidates]
    if report.teachers:
        result["teachers"] = [teacher.model_dump() for teacher in report.teachers]
    return result


def describe_augmentation(augment: AugmentConfig) -> str:
    """The keys of a recipe's augment section that change anything, as `flip, shift 4, erase 0.5`."""
    plain = AugmentConfig().model_dump(mode="json")
    words = []
    for key, value in augment.model_dump(mode="json").items():
        if value == plain[key]:
            continue
        shown = "–".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value}"
        words.append(key if value is True else f"{key} {shown}")
    return ", ".join(words) or "none"


def _plain_row(report: Report, step: Literal["scalar", "adjusted"], method: str) -> Row:
    """The row of a step without MARC; its calibrated figures are with a temperature."""
    alone = report.temperature_only[step]
    # The selected scalar changes confidence: the error as trained is from before it.
    before: Step = "trained" if step == "scalar" and recipe_in(report).calibrate.rescale == "off" else step
    ranks = report.rank_groups.test[step]
    return _row(method, alone.test, ranks, report.test[before].ece, alone.test_under_train_prior)


def _calibrated_row(report: Report, method: str) -> Row:
    prior = report.test_under_train_prior["calibrated"]
    ranks = report.rank_groups.test["calibrated"]
    return _row(method, report.test["calibrated"], ranks, report.test["marc"].ece, prior)


def _candidate(report: Report, each: Candidate) -> Row:
    """A calibration that was compared: by held-out images, and on the test, which had no part in the choice."""
    found = report.candidates[each.method]
    return {
        "method": each.method,
        "served": each.method == report.calibration.method,
        "numbers": each.numbers,
        "nll": _short(each.nll),
        "loss": _short(each.loss),
        "difference": _short(each.difference),
        "standard_error": _short(each.standard_error),
        "test": {
            "accuracy": _short(found.test.accuracy),
            "few": _short(found.test.groups["few"]),
            "ece": _short(found.test.ece),
            "ece_debiased": _short(found.test.ece_debiased),
            "nll": _short(found.test.nll),
        },
        "train_prior": {
            "accuracy": _short(found.test_under_train_prior.accuracy),
            "ece": _short(found.test_under_train_prior.ece),
            "nll": _short(found.test_under_train_prior.nll),
        },
    }


def _row(method: str, final: Figures, ranks: dict[str, float | None], ece: float, prior: Figures) -> Row:
    return {
        "method": method,
        "accuracy": _short(final.accuracy),
        "groups": {name: _short(value) for name, value in final.groups.items()},
        "rank_groups": {name: _short(value) for name, value in ranks.items()},
        "ece": _short(ece),
        "ece_calibrated": _short(final.ece),
        "classwise_ece_calibrated": _short(final.classwise_ece),
        "nll_calibrated": _short(final.nll),
        "brier_calibrated": _short(final.brier),
        "train_prior": {"accuracy": _short(prior.accuracy), "ece": _short(prior.ece)},
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def load_results(folder: Path) -> list[Row]:
    """All rows of all result files in a folder, each with the shared part of its file and the file's name.

    Raises:
        ResultsError: if the folder is missing, or a file in it is not a result.
    """
    if not folder.is_dir():
        raise ResultsError(
            f"no result files at {folder}: the repository has them in docs/results; name a folder with --from FOLDER"
        )
    rows: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        result = _read(path)
        shared = {key: result[key] for key in (*SETTING, "seed", "commit", "hardware")}
        shared["trained_with"] = result.get("trained_with", [])  # absent from older files
        shared["candidates"] = result.get("candidates", [])  # of calibrate.method = auto
        rows += [shared | row | {"file": path.name} for row in result["rows"]]
    return sorted(rows, key=_order)


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ResultFile.model_validate(result)
    except UnicodeDecodeError:
        what = "it is not text in UTF-8"
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    except ValueError as error:
        what = f"it is not JSON: {error}"
    else:
        return result
    raise ResultsError(f"{path} is not a result of camcal: {what}")


def _order(row: Row) -> tuple[Any, ...]:
    return (row["dataset"], -row["imbalance"], row["backbone"], row["epochs"], row["augmentation"], row["seed"])


def settings(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Comparable rows, grouped under a title that says what they share."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = (
            f"{row['dataset']}, imbalance {row['imbalance']:g}, {row['backbone']}, {row['epochs']} epochs, "
            f"augmentation: {row['augmentation']}"
        )
        found.setdefault(title, []).append(row)
    return list(found.items())


def methods(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """One setting's rows by method, the least accurate training first; `X + …` follows X."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)

    def place(method: str) -> tuple[float, str, str]:
        base = re.split(r" \+ (?:MARC|logit adjustment|lean|shrunk margins|auto)", method)[0]
        return mean(row["accuracy"] for row in by_method.get(base, by_method[method])), base, method

    return [(method, by_method[method]) for method in sorted(by_method, key=place)]


def group_names(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """The groups to show: those by count, or those by rank if a group by count is always empty."""
    by_count = list(rows[0]["groups"])
    empty = any(all(row["groups"].get(name) is None for row in rows) for name in by_count)
    return ("rank_groups", list(rows[0]["rank_groups"])) if empty else ("groups", by_count)


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean and sample standard deviation over seeds, in percent; only the mean of one seed; n/a of none."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "n/a"
    return f"{mean(known):.{digits}f}" + (f"±{stdev(known):.{digits}f}" if len(known) > 1 else "")
