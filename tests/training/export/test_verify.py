from contextlib import nullcontext
from dataclasses import replace

import pytest
from rich.console import Console

from camcal.models.bundle import Bundle
from camcal.training.data import Dataset, load_dataset
from camcal.training.export.verify import VerifyError, recipe_of, verify
from camcal.training.recipe import RecipeError
from camcal.training.run import Run


@pytest.fixture(scope="module")
def bundle(digits_run: Run) -> Bundle:
    return Bundle.load(digits_run.bundle)


@pytest.fixture(scope="module")
def data(bundle: Bundle) -> Dataset:
    recipe = recipe_of(bundle, [])
    return load_dataset(recipe.data, recipe.seed)


def test_the_graph_does_what_the_report_of_the_network_says(
    bundle: Bundle, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify(bundle, data, Console(width=140))
    for name, step in (("probabilities", "scalar"), ("calibrated_probabilities", "calibrated")):
        said = bundle.report["test"][step]
        assert found[name]["nll"] == pytest.approx(said["nll"], abs=1e-4)
        assert found[name]["accuracy"] == said["accuracy"]
        assert found[name]["groups"] == said["groups"]
    assert found["calibrated_probabilities"]["nll"] < found["probabilities"]["nll"]
    under, said = found["training prior"], bundle.report["test_under_train_prior"]["calibrated"]
    assert (under["accuracy"], under["groups"]) == (pytest.approx(said["accuracy"]), said["groups"])
    assert (under["nll"], under["ece"]) == (pytest.approx(said["nll"], abs=1e-4), pytest.approx(said["ece"], abs=1e-4))
    out = capsys.readouterr().out
    few = bundle.report["by_predicted_group"]["calibrated"]["few"]
    assert f"{100 * few['confidence']:.1f} → {100 * few['accuracy']:.1f} ({100 * few['ece']:.1f})" in out
    assert f"{len(data.test)} test images" in out and "calibrated_probabilities, by the report" in out
    assert f"an ECE of {bundle.report['by_chance']['ece']:.1%} on these images by chance" in out


@pytest.mark.parametrize(("figure", "by"), [("accuracy", 0.01), ("ece", -0.003)])
def test_a_report_that_promises_something_else_is_found_out(
    bundle: Bundle, data: Dataset, figure: str, by: float
) -> None:
    test = bundle.report["test"]
    promised = test | {"calibrated": test["calibrated"] | {figure: test["calibrated"][figure] + by}}
    with pytest.raises(VerifyError, match=f"the {figure} of the calibrated_probabilities is .* by the report"):
        verify(replace(bundle, report=bundle.report | {"test": promised}), data, Console(quiet=True))


def test_another_promise_for_the_training_prior_is_found_out(bundle: Bundle, data: Dataset) -> None:
    under = bundle.report["test_under_train_prior"]
    promised = under | {"calibrated": under["calibrated"] | {"ece": under["calibrated"]["ece"] + 0.05}}
    with pytest.raises(VerifyError, match="the ece of the training prior is .* by the report"):
        verify(replace(bundle, report=bundle.report | {"test_under_train_prior": promised}), data, Console(quiet=True))


def test_a_smaller_graph_may_differ_by_what_its_export_allows(bundle: Bundle, data: Dataset) -> None:
    smaller = replace(bundle, manifest=bundle.manifest.model_copy(update={"precision": "int8"}))
    test = bundle.report["test"]
    for by, refused in ((0.004, False), (0.006, True)):
        promised = test | {"calibrated": test["calibrated"] | {"ece": test["calibrated"]["ece"] + by}}
        judged = replace(smaller, report=bundle.report | {"test": promised})
        with pytest.raises(VerifyError) if refused else nullcontext():
            verify(judged, data, Console(quiet=True))


def test_other_classes_are_refused(bundle: Bundle, data: Dataset) -> None:
    renamed = replace(data, classes=[*data.classes[:-1], "another"])
    with pytest.raises(VerifyError, match="10 classes, and they are not those of the bundle"):
        verify(bundle, renamed, Console(quiet=True))


def test_the_recipe_may_be_told_where_the_data_lies(bundle: Bundle) -> None:
    assert recipe_of(bundle, []).data.root is None
    assert str(recipe_of(bundle, ["data.root=elsewhere"]).data.root) == "elsewhere"
    for other in ("data.rot=elsewhere", "fit.epochs=4", "data.imbalance=3"):
        with pytest.raises(RecipeError, match=f"--set {other}: only data.root can change here"):
            recipe_of(bundle, [other])
