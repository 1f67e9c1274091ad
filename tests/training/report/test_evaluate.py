import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy.optimize import minimize_scalar

from camcal.models.report import FittedCalibration, Report, Step
from camcal.training.calibration.logits import predict_logits
from camcal.training.checkpoints import build_network, load_network
from camcal.training.data import load_dataset
from camcal.training.priors import Floats
from camcal.training.recipe import LossConfig, Recipe, load_recipe, parse_recipe
from camcal.training.report.page import page
from camcal.training.report.summary import print_report, steps_for_prior, steps_taken
from camcal.training.run import RunFolder
from tests.training.runs import calibrated, evaluated


def _fitted(meta: dict[str, Any], **temperatures: float) -> FittedCalibration:
    """The calibration of a run, with other temperatures if given."""
    fitted = FittedCalibration.model_validate(meta["calibration"])
    return fitted.model_copy(update={"prior_temperatures": temperatures}) if temperatures else fitted


def test_the_report_of_a_real_run(digits_run: RunFolder) -> None:
    report = json.loads(digits_run.report.read_text())
    assert report["data"]["train"] + report["data"]["holdout"] == 527 and report["data"]["test"] == 400
    assert report["data"]["groups"] == {"many": 1, "medium": 7, "few": 2}
    test = report["test"]
    assert list(test) == ["trained", "adjusted", "scalar", "marc", "calibrated"]
    assert test["trained"]["accuracy"] == test["scalar"]["accuracy"]
    assert test["marc"]["accuracy"] == test["calibrated"]["accuracy"] > 0.6
    assert test["calibrated"]["groups"]["few"] > test["trained"]["groups"]["few"]
    per_class = [row["accuracy_calibrated"] for row in report["per_class"]]
    assert np.mean(per_class) == pytest.approx(test["calibrated"]["accuracy"], abs=1e-3)
    assert sum(b["share"] for b in report["reliability"]["calibrated"]) == pytest.approx(1)


def test_margins_and_what_marc_did_to_them(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, recipe, _ = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    marc = parse_recipe(recipe.model_dump(mode="json"), "x", ["calibrate.method=marc"])
    report = evaluated(network, data, marc, calibrated(network, data, marc)).to_json()
    omega, beta = network.marc.omega.tolist(), network.marc.beta.tolist()
    for k, row in enumerate(report["per_class"]):
        # d' = ω·d + β for every image of the class, so for their mean and spread too.
        assert row["margin_calibrated"] == pytest.approx(omega[k] * row["margin_trained"] + beta[k], abs=1e-3)
        assert row["margin_spread_calibrated"] == pytest.approx(omega[k] * row["margin_spread_trained"], abs=1e-3)


def test_a_cosine_head_s_margin_is_the_cosine_of_feature_and_weight(
    digits_run: RunFolder, digits_recipe: Recipe
) -> None:
    report = json.loads(digits_run.report.read_text())
    network, _, _ = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    with torch.no_grad():
        maps = network._reinforce(network.features(data.test.images).unsqueeze(1)).squeeze(1)
        g, w = maps.mean(dim=(2, 3)).double().numpy(), network.head.weight.double().numpy()
    y = data.test.labels.numpy()
    cosines_N = (g * w[y]).sum(axis=1) / np.linalg.norm(g, axis=1) / np.linalg.norm(w[y], axis=1)
    for k, row in enumerate(report["per_class"]):
        assert row["margin_trained"] == pytest.approx(cosines_N[y == k].mean(), abs=1e-3)
        assert row["margin_spread_trained"] == pytest.approx(cosines_N[y == k].std(), abs=1e-3)


def test_rank_groups_are_means_over_their_classes(digits_run: RunFolder) -> None:
    report = json.loads(digits_run.report.read_text())
    assert report["rank_groups"]["sizes"] == {"head": 3, "middle": 4, "tail": 3}
    rarest = [row["accuracy_calibrated"] for row in report["per_class"][7:]]
    assert report["rank_groups"]["test"]["calibrated"]["tail"] == pytest.approx(np.mean(rarest), abs=1e-3)


def test_predictions_are_judged_by_the_group_of_the_class_they_name(digits_run: RunFolder) -> None:
    report = json.loads(digits_run.report.read_text())
    for step, found in report["by_predicted_group"].items():
        for names in (("many", "medium", "few"), ("head", "middle", "tail")):
            groups = [found[name] for name in names if found[name]]
            assert sum(group["share"] for group in groups) == pytest.approx(1)
            accuracy = sum(group["share"] * group["accuracy"] for group in groups)
            assert accuracy == pytest.approx(report["test"][step]["accuracy"])
    before, after = (report["by_predicted_group"][step]["few"]["share"] for step in ("trained", "calibrated"))
    assert before < after  # calibration brings the rare classes out


def test_every_step_has_a_diagram_that_gives_its_calibration_error(digits_run: RunFolder) -> None:
    report = json.loads(digits_run.report.read_text())
    for diagrams, figures in (
        (report["reliability"], report["test"]),
        (report["reliability_under_train_prior"], report["test_under_train_prior"]),
    ):
        assert diagrams.keys() == figures.keys()
        for step, bins in diagrams.items():
            gap = sum(b["share"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["accuracy"] is not None)
            assert gap == pytest.approx(figures[step]["ece"])


def test_a_temperature_after_taking_out_the_prior_fits_the_held_out_part(
    digits_run: RunFolder, digits_recipe: Recipe
) -> None:
    report = json.loads(digits_run.report.read_text())
    adjusted, before = report["temperature_only"]["adjusted"], report["test"]["adjusted"]
    assert adjusted["test"]["accuracy"] == before["accuracy"]
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    labels = data.holdout.labels
    z = predict_logits(network, data.holdout).double() - torch.tensor(meta["calibration"]["logit_prior"]).log()
    weights = (1 / labels.bincount()[labels].double()).numpy()

    def loss(temperature: float) -> float:
        own = (z / temperature).log_softmax(1).gather(1, labels[:, None]).squeeze(1).numpy()
        samples = weights.sum() ** 2 / (weights**2).sum()
        pull = math.log(temperature) ** 2 / (2 * recipe.calibrate.spread**2 * samples)
        return float(-(weights @ own) / weights.sum() + pull)

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x
    assert adjusted["temperature"] == pytest.approx(best, rel=1e-3)


def test_a_temperature_without_marc_keeps_the_order_of_classes(digits_run: RunFolder) -> None:
    report = json.loads(digits_run.report.read_text())
    alone, scalar = report["temperature_only"]["scalar"], report["test"]["scalar"]
    assert alone["test"]["accuracy"] == scalar["accuracy"] and alone["test"]["groups"] == scalar["groups"]
    # It is fitted for a balanced prior, on which the balanced test judges.
    assert alone["temperature"] > 0 and alone["test"]["nll"] < scalar["nll"]


def test_the_worst_classes_come_with_what_they_are_taken_for(digits_run: RunFolder) -> None:
    report = json.loads(digits_run.report.read_text())
    accuracies = [row["accuracy"] for row in report["worst_classes"]]
    assert accuracies == sorted(accuracies)
    assert accuracies[0] == min(row["accuracy_calibrated"] for row in report["per_class"])
    for row in report["worst_classes"]:
        assert 0 < sum(t["share"] for t in row["taken_for"]) <= 1 - row["accuracy"] + 1e-3


def test_the_report_says_what_made_it(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    report = json.loads(digits_run.report.read_text())
    assert report["made_with"].keys() == {"version", "commit", "hardware", "date"}
    assert "torch" in report["made_with"]["hardware"]
    assert parse_recipe(report["settings"], "report") == digits_recipe


def test_the_report_has_the_curve_of_the_scalar(digits_run: RunFolder) -> None:
    report = json.loads(digits_run.report.read_text())
    curve = report["scalar_curve"]
    assert {len(point) for point in curve} == {13}
    assert {point["accuracy"] for point in curve} == {report["test"]["trained"]["accuracy"]}
    best = min(curve, key=lambda point: point["nll"])
    (selected,) = [p for p in curve if p["scalar"] == pytest.approx(report["calibration"]["scalar"], rel=1e-6)]
    assert selected["nll"] < 1.5 * best["nll"]
    for prefix, step in (("", "scalar"), ("adjusted_", "adjusted")):
        for figure in ("accuracy", "ece", "nll"):
            assert selected[prefix + figure] == pytest.approx(report["test"][step][figure], rel=1e-4), (step, figure)


def test_the_lean_comes_after_the_margins(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, recipe, _ = load_network(digits_run.network)
    changes = ["calibrate.method=marc", "calibrate.marc_lean=true"]
    leaning = parse_recipe(recipe.model_dump(mode="json"), "x", changes)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    fitted = calibrated(network, data, leaning)
    report = evaluated(network, data, leaning, fitted)
    plain = parse_recipe(recipe.model_dump(mode="json"), "x", ["calibrate.method=marc"])
    again, _, _ = load_network(digits_run.network)
    before = evaluated(again, data, plain, calibrated(again, data, plain))
    steps: tuple[Step, ...] = ("scalar", "adjusted", "marc")
    for step in steps:
        assert report.test[step].nll == pytest.approx(before.test[step].nll, rel=1e-3), step
    with torch.no_grad():
        served = network.calibrate(predict_logits(network, data.test)).double()
    log_p = (served / fitted.temperature).log_softmax(dim=1)[torch.arange(len(served)), data.test.labels]
    balanced = np.mean([-log_p[data.test.labels == k].mean() for k in range(10)])
    assert report.test["calibrated"].nll == pytest.approx(balanced, rel=1e-4)
    log_prior = torch.from_numpy(data.train_counts()).double().log()
    shifted = (served / fitted.prior_temperatures["train"] + log_prior).softmax(dim=1).argmax(dim=1)
    right = (shifted == data.test.labels).double()
    counts = data.train_counts()
    expected = sum(counts[k] * right[data.test.labels == k].mean() for k in range(10)) / counts.sum()
    assert report.test_under_train_prior["calibrated"].accuracy == pytest.approx(float(expected))
    assert list(steps_taken(report).values())[-2:] == ["+ MARC", "+ lean, temperature"]
    assert list(steps_for_prior(report).values())[-1] == "+ MARC, lean, temperature"
    report.calibration = fitted.model_copy(update={"lean": -0.2})
    words = page(report)
    assert "<dt>lean</dt><dd>-0.20 of the logarithm of the training prior</dd>" in words
    assert "<dt>lean</dt>" not in page(before)


def test_each_candidate_is_judged_as_if_it_were_served(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    report = Report.read(digits_run.report)
    assert list(report.candidates) == ["temperature", "lean", "marc", "shrunk"]
    for method, found in report.candidates.items():
        other = parse_recipe(recipe.model_dump(mode="json"), "x", [f"calibrate.method={method}"])
        served = evaluated(network, data, other, calibrated(network, data, other))
        assert served.test["calibrated"].nll == pytest.approx(found.test.nll, rel=1e-3)
        assert served.test["calibrated"].accuracy == pytest.approx(found.test.accuracy)
        under = served.test_under_train_prior["calibrated"]
        assert under.nll == pytest.approx(found.test_under_train_prior.nll, rel=1e-3)
        has_margins = method in ("marc", "shrunk")
        assert (served.test["marc"].nll == pytest.approx(served.test["adjusted"].nll, rel=1e-6)) != has_margins


def test_a_class_with_more_test_images_weighs_no_more(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    index = np.arange(len(data.test))
    threes = np.flatnonzero(data.test.labels.numpy() == 3)
    longer = replace(data, test=data.test.subset(np.concatenate([index, threes, threes])))
    even, uneven = (evaluated(network, part, recipe, _fitted(meta)) for part in (data, longer))

    def flat(report: Report) -> list[float]:
        found = [*report.test.values(), *report.test_under_train_prior.values()]
        for alone in report.temperature_only.values():
            found += [alone.test, alone.test_under_train_prior]
        bins = [b for diagram in report.reliability.values() for b in diagram]
        resampled = ("groups", "ece_by_chance", "ece_debiased", "ece_interval")  # which more images change
        return [v for figures in found for k, v in figures if k not in resampled] + [b.share for b in bins]

    assert flat(uneven) == pytest.approx(flat(even))


def _nll(logits: Floats, shift: Floats, labels: NDArray[np.int64], prior: Floats) -> float:
    """Of softmax(z)·shift, samples weighted to a prior, by NumPy alone."""
    p = np.exp(logits) * shift
    own = p[np.arange(len(labels)), labels] / p.sum(axis=1)
    weights = (prior / np.bincount(labels))[labels]
    return float(weights @ -np.log(own) / weights.sum())


def test_each_prior_is_judged_with_its_own_shift_temperature_and_weights(
    digits_run: RunFolder, digits_recipe: Recipe
) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    given = np.array([0.02, 0.02, 0.02, 0.02, 0.02, 0.1, 0.2, 0.2, 0.2, 0.2])
    asked = parse_recipe(recipe.model_dump(mode="json"), "x", [f"calibrate.prior={(5 * given).tolist()}"])
    report = evaluated(network, data, asked, _fitted(meta, train=2.0, given=1.3)).to_json()
    with torch.no_grad():
        z = network.calibrate(predict_logits(network, data.test)).double().numpy()
    prior = data.train_counts() / data.train_counts().sum()
    for name, temperature, wanted in (("train", 2.0, prior), ("given", 1.3, given)):
        expected = _nll(z / temperature, wanted, data.test.labels.numpy(), wanted)
        found = report[f"test_under_{name}_prior"]["calibrated"]["nll"]
        assert found == pytest.approx(expected, rel=1e-4), name


def test_a_temperature_alone_for_the_training_prior_keeps_to_the_prior_of_the_logits(
    digits_run: RunFolder, digits_recipe: Recipe
) -> None:
    report = json.loads(digits_run.report.read_text())
    network, recipe, _ = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    held, z = (predict_logits(network, part).double().numpy() for part in (data.holdout, data.test))
    labels = data.holdout.labels.numpy()
    seen = data.train.labels.bincount().numpy() / len(data.train)
    prior = data.train_counts() / data.train_counts().sum()
    weights = (prior / np.bincount(labels))[labels]

    def loss(t: float) -> float:
        samples = float(weights.sum() ** 2 / (weights**2).sum())
        return _nll(np.exp(t) * held, prior / seen, labels, prior) + t**2 / (2 * recipe.calibrate.spread**2 * samples)

    factor = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    expected = _nll(factor * z, prior / seen, data.test.labels.numpy(), prior)
    found = report["temperature_only"]["scalar"]["test_under_train_prior"]["nll"]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("rescale", ["tau", "lws"])
def test_rescaled_logits_count_as_balanced(digits_recipe: Recipe, rescale: str) -> None:
    changes = ["model.head=linear", "model.camc=off", "calibrate.method=temperature", "calibrate.iterations=100"]
    recipe = load_recipe("digits", [*changes, f"calibrate.rescale={rescale}"])
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    network = build_network(recipe, 10).eval()
    with torch.no_grad():
        network.head.weight.mul_(torch.linspace(30, 3, 10)[:, None])
    fitted = calibrated(network, data, recipe)
    report = evaluated(network, data, recipe, fitted)
    z, labels = predict_logits(network, data.test).double().numpy(), data.test.labels.numpy()
    prior = data.train_counts() / data.train_counts().sum()
    assert report.test_under_train_prior["scalar"].nll == pytest.approx(_nll(z, prior, labels, prior), rel=1e-4)


def test_the_curve_of_held_out_images_counts_each_class_alike(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    curve = json.loads(digits_run.report.read_text())["scalar_curve"]
    network, _, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    z, labels = predict_logits(network, data.holdout).double().numpy(), data.holdout.labels.numpy()
    (point,) = [p for p in curve if p["scalar"] == pytest.approx(meta["calibration"]["scalar"], rel=1e-6)]
    even = np.full(10, 0.1)
    right = z.argmax(axis=1) == labels
    assert point["holdout_accuracy"] == pytest.approx(np.mean([right[labels == k].mean() for k in range(10)]))
    assert point["holdout_accuracy"] != pytest.approx(right.mean())
    assert point["holdout_nll"] == pytest.approx(_nll(z, np.ones(10), labels, even), rel=1e-4)
    adjusted = _nll(z, 1 / np.array(meta["calibration"]["logit_prior"]), labels, even)
    assert point["holdout_adjusted_nll"] == pytest.approx(adjusted, rel=1e-4)


def test_a_given_prior_is_judged_as_the_training_prior_is(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    counts = [float(n) for n in meta["train_counts"]]
    by_name = dict(zip(meta["classes"], counts, strict=True))
    given = recipe.model_copy(update={"calibrate": recipe.calibrate.model_copy(update={"prior": by_name})})
    report = evaluated(network, data, given, _fitted(meta, train=2.0, given=2.0))
    assert report.test_under_given_prior == {"calibrated": report.test_under_train_prior["calibrated"]}
    assert "test_under_given_prior" not in json.loads(digits_run.report.read_text())
    output = io.StringIO()
    print_report(report, Console(file=output, width=140))
    assert "given prior" in output.getvalue() and "prior that the recipe gives" in page(report)


def test_raw_probabilities_of_balanced_training_are_shifted_to_the_training_prior(
    digits_run: RunFolder, digits_recipe: Recipe
) -> None:
    network, recipe, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    balanced = recipe.model_copy(update={"loss": LossConfig(name="balanced_softmax")})
    plain, shifted = (evaluated(network, data, changed, _fitted(meta)) for changed in (recipe, balanced))
    assert plain.test["trained"] == shifted.test["trained"]
    assert shifted.test["adjusted"].accuracy == shifted.test["scalar"].accuracy
    z, y = predict_logits(network, data.test, trained=True).double().numpy(), data.test.labels.numpy()
    all_K = data.train_counts().astype(np.float64)
    seen_K = data.train.labels.bincount(minlength=10).numpy()
    # Cross-entropy's are for the frequencies of what was trained on, those without the held-out images.
    for report, ratio_K in ((plain, all_K / seen_K), (shifted, all_K)):
        nll = _nll(z, ratio_K, y, all_K)
        assert report.test_under_train_prior["trained"].nll == pytest.approx(nll, rel=1e-4)
