import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from camcal.models.bundle import Bundle
from camcal.models.report import Report, Step
from camcal.training.checkpoints import save_json
from camcal.training.data import Dataset, load_dataset
from camcal.training.export.verify import VerifyError, recipe_of, verify
from camcal.training.recipe import RecipeError
from camcal.training.run import RunFolder


@pytest.fixture(scope="module")
def bundle(digits_run: RunFolder) -> Bundle:
    return Bundle.load(digits_run.bundle)


@pytest.fixture(scope="module")
def data(bundle: Bundle) -> Dataset:
    recipe = recipe_of(bundle, [])
    return load_dataset(recipe.data, recipe.seed)


@pytest.fixture
def told(bundle: Bundle, tmp_path: Path) -> Callable[[Report], Bundle]:
    """The bundle with another report, whose checksum nobody checks again."""

    def changed(report: Report) -> Bundle:
        folder = Path(shutil.copytree(bundle.path, tmp_path / "told", dirs_exist_ok=True))
        save_json(folder / "report.json", report.to_json())
        return replace(bundle, path=folder)

    return changed


def _report(bundle: Bundle) -> Report:
    return Report.read(bundle.path / "report.json")


def test_the_graph_does_what_the_report_of_the_network_says(
    bundle: Bundle, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    found, report = verify(bundle, data, Console(width=140)), _report(bundle)
    steps: tuple[tuple[str, Step], ...] = (("probabilities", "scalar"), ("calibrated_probabilities", "calibrated"))
    for name, step in steps:
        said = report.test[step]
        assert found[name].nll == pytest.approx(said.nll, abs=1e-4)
        assert found[name].accuracy == said.accuracy
        assert found[name].groups == said.groups
    assert found["calibrated_probabilities"].nll < found["probabilities"].nll
    under, said = found["training prior"], report.test_under_train_prior["calibrated"]
    assert under.accuracy == pytest.approx(said.accuracy) and under.groups == said.groups
    assert under.nll == pytest.approx(said.nll, abs=1e-4) and under.ece == pytest.approx(said.ece, abs=1e-4)
    out = capsys.readouterr().out
    few = report.by_predicted_group["calibrated"]["few"]
    assert few is not None
    errors = f"{100 * few.ece:.1f}, {100 * few.ece_by_chance:.1f}"
    assert f"{100 * few.confidence:.1f} → {100 * few.accuracy:.1f} ({errors})" in out
    assert f"{len(data.test)} test images" in out and "calibrated_probabilities, by the report" in out
    low, high = report.test["calibrated"].ece_interval
    assert "by chance" in out and f"{100 * low:.1f} to {100 * high:.1f}" in out


@pytest.mark.parametrize(("figure", "by"), [("accuracy", 0.01), ("ece", -0.003)])
def test_a_report_that_promises_something_else_is_found_out(
    bundle: Bundle, told: Callable[[Report], Bundle], data: Dataset, figure: str, by: float
) -> None:
    report = _report(bundle)
    setattr(report.test["calibrated"], figure, getattr(report.test["calibrated"], figure) + by)
    with pytest.raises(VerifyError, match=f"the {figure} of the calibrated_probabilities is .* by the report"):
        verify(told(report), data, Console(quiet=True))


def test_another_promise_for_the_training_prior_is_found_out(
    bundle: Bundle, told: Callable[[Report], Bundle], data: Dataset
) -> None:
    report = _report(bundle)
    report.test_under_train_prior["calibrated"].ece += 0.05
    with pytest.raises(VerifyError, match="the ece of the training prior is .* by the report"):
        verify(told(report), data, Console(quiet=True))


def test_a_smaller_graph_may_differ_by_what_its_export_allows(
    bundle: Bundle, told: Callable[[Report], Bundle], data: Dataset
) -> None:
    for by, refused in ((0.004, False), (0.006, True)):
        report = _report(bundle)
        report.test["calibrated"].ece += by
        smaller = replace(told(report), manifest=bundle.manifest.model_copy(update={"precision": "int8"}))
        with pytest.raises(VerifyError) if refused else nullcontext():
            verify(smaller, data, Console(quiet=True))


def test_other_classes_are_refused(bundle: Bundle, data: Dataset) -> None:
    renamed = replace(data, classes=[*data.classes[:-1], "another"])
    with pytest.raises(VerifyError, match="10 classes, which are not those of the bundle"):
        verify(bundle, renamed, Console(quiet=True))


def test_the_recipe_may_be_told_where_the_data_lies(bundle: Bundle) -> None:
    assert recipe_of(bundle, []).data.root is None
    assert str(recipe_of(bundle, ["data.root=elsewhere"]).data.root) == "elsewhere"
    for other in ("data.rot=elsewhere", "fit.epochs=4", "data.imbalance=3"):
        with pytest.raises(RecipeError, match=f"--set {other}: only data.root can change"):
            recipe_of(bundle, [other])
