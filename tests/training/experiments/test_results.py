import json
import math
from pathlib import Path
from typing import Any

import pytest

from camcal.models.report import Report
from camcal.training.checkpoints import save_json
from camcal.training.experiments.results import (
    FOLDER,
    ResultsError,
    Row,
    describe_augmentation,
    group_names,
    load_results,
    methods,
    result_of,
    settings,
    spread,
)
from camcal.training.recipe import AugmentConfig, RecipeError, load_recipe, parse_recipe
from camcal.training.run import RunFolder

ASKED_FOR = {
    "dataset",
    "imbalance",
    "backbone",
    "method",
    "augmentation",
    "epochs",
    "seed",
    "accuracy",
    "groups",
    "ece",
    "ece_calibrated",
    "commit",
    "hardware",
}


@pytest.fixture
def report(digits_run: RunFolder) -> Report:
    return Report.read(digits_run.report)


def _row(method: str, accuracy: float, **more: Any) -> Row:
    return {"method": method, "accuracy": accuracy} | more


def test_one_run_gives_the_row_as_trained_and_those_calibrated_afterwards(report: Report, tmp_path: Path) -> None:
    save_json(tmp_path / "x.json", result_of(report, "cosine"))
    plain, adjusted, marc = load_results(tmp_path)
    assert ASKED_FOR <= plain.keys() and plain.keys() == adjusted.keys() == marc.keys()
    methods = [row["method"] for row in (plain, adjusted, marc)]
    assert methods == ["cosine", "cosine + logit adjustment", "cosine + auto"]
    test, alone = report.test, report.temperature_only
    assert plain["accuracy"] == pytest.approx(test["trained"].accuracy, abs=1e-5)
    assert plain["ece"] == pytest.approx(test["trained"].ece, abs=1e-5)
    assert plain["ece_calibrated"] == pytest.approx(alone["scalar"].test.ece, abs=1e-5)
    assert adjusted["accuracy"] == pytest.approx(test["adjusted"].accuracy, abs=1e-5)
    assert adjusted["ece_calibrated"] == pytest.approx(alone["adjusted"].test.ece, abs=1e-5)
    assert marc["accuracy"] == pytest.approx(test["calibrated"].accuracy, abs=1e-5)
    assert marc["ece"] == pytest.approx(test["marc"].ece, abs=1e-5)
    assert marc["ece_calibrated"] == pytest.approx(test["calibrated"].ece, abs=1e-5)
    assert (plain["dataset"], plain["imbalance"], plain["epochs"], plain["seed"]) == ("digits", 10, 12, 0)
    assert plain["augmentation"] == "shift 3"
    assert [made["commit"] for made in plain["trained_with"]] == [plain["commit"]]


def test_a_result_names_the_hardware_of_the_training(report: Report) -> None:
    assert result_of(report, "a")["trained_with"] == [made.model_dump() for made in report.trained_with]
    report.trained_with.append(report.made_with.model_copy(update={"hardware": "a GPU"}))
    assert result_of(report, "a")["hardware"] == "a GPU" != report.made_with.hardware


def test_rows_can_be_named_and_left_out(report: Report) -> None:
    assert [r["method"] for r in result_of(report, "a", "b", plain=False)["rows"]] == ["b"]
    calibrate = report.settings["calibrate"]
    assert [r["method"] for r in result_of(report, "a", plain=False)["rows"]] == ["a + auto"]
    calibrate["method"] = "shrunk"
    assert [r["method"] for r in result_of(report, "a", plain=False)["rows"]] == ["a + shrunk margins"]
    calibrate |= {"method": "marc", "marc_lean": True}
    assert [r["method"] for r in result_of(report, "a", plain=False)["rows"]] == ["a + MARC, lean"]
    calibrate["marc_on"] = "both"
    assert [r["method"] for r in result_of(report, "a", plain=False)["rows"]] == ["a + MARC, held-out too, lean"]
    calibrate["method"] = "lean"
    assert [r["method"] for r in result_of(report, "a", plain=False)["rows"]] == ["a + logit adjustment, lean"]
    calibrate["method"] = "temperature"
    assert [r["method"] for r in result_of(report, "a")["rows"]] == ["a", "a + logit adjustment"]
    report.calibration = report.calibration.model_copy(update={"logit_prior": [0.1] * 10})
    assert [r["method"] for r in result_of(report, "a")["rows"]] == ["a"]
    calibrate["method"] = "lean"
    assert [r["method"] for r in result_of(report, "a", plain=False)["rows"]] == ["a + lean"]


def test_a_rescaled_head_is_judged_as_rescaled(report: Report) -> None:
    report.settings["model"]["head"] = "linear"
    report.settings["calibrate"] |= {"method": "temperature", "rescale": "tau"}
    report.test["scalar"].ece, report.test["trained"].ece = 0.125, 0.5
    (row,) = result_of(report, "tau-norm")["rows"]
    assert (row["method"], row["ece"]) == ("tau-norm", 0.125)


def test_a_result_has_the_calibrations_that_were_compared(report: Report) -> None:
    found = result_of(report, "cosine")["candidates"]
    assert [each["method"] for each in found] == list(report.candidates)
    (served,) = [each for each in found if each["served"]]
    assert served["method"] == report.calibration.method and served["difference"] == 0
    assert served["test"]["nll"] == pytest.approx(report.test["calibrated"].nll, abs=1e-4)
    assert served["train_prior"]["ece"] == pytest.approx(report.test_under_train_prior["calibrated"].ece, abs=1e-4)
    report.calibration = report.calibration.model_copy(update={"candidates": report.calibration.candidates[:1]})
    assert "candidates" not in result_of(report, "cosine")


def test_a_result_is_small_and_names_no_folder(report: Report, tmp_path: Path) -> None:
    save_json(tmp_path / "x.json", result_of(report, "cosine"))
    text = (tmp_path / "x.json").read_text()
    assert len(text) < 10_000 and "root" not in text and str(Path.home()) not in text


def test_a_result_is_a_recipe(report: Report, tmp_path: Path) -> None:
    save_json(tmp_path / "x.json", result_of(report, "cosine"))
    assert load_recipe(tmp_path / "x.json") == load_recipe("digits")
    assert load_recipe(tmp_path / "x.json", ["fit.lr=0.5"]).fit.lr == 0.5


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*distilled*.json")), ids=lambda path: path.stem)
def test_a_distilled_result_repeats_with_its_teacher(path: Path) -> None:
    teaching = load_recipe(path, ["data.root=."]).teaching()
    found = json.loads(path.read_text())
    assert teaching
    for taught_by, teacher in zip(teaching, found.get("teachers") or [found["teacher"]], strict=True):
        wanted = parse_recipe(teacher["recipe"], path.name, ["data.root=."])
        assert taught_by.deciding() | {"calibrate": None} == wanted.deciding() | {"calibrate": None}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": "digits"}'])
def test_other_json_is_not_a_recipe(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(RecipeError, match="x.json is not a result file: expected JSON with a recipe in it"):
        load_recipe(tmp_path / "x.json")


def test_a_binary_file_is_not_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="x.json is not a result file: it is not text in UTF-8"):
        load_recipe(tmp_path / "x.json")


def test_augmentation_names_what_changes_anything() -> None:
    assert describe_augmentation(AugmentConfig()) == "none"
    augment = AugmentConfig(flip=True, shift=4, area=(0.35, 1.1), fill="random")
    assert describe_augmentation(augment) == "flip, shift 4, area 0.35–1.1, fill random"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"rows": []}'])
def test_a_foreign_file_among_results_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "foreign.json").write_text(content)
    with pytest.raises(ResultsError, match="foreign.json is not a result of camcal"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("rows", 0, "accuracy"), "0.5", "rows.0.accuracy: Input should be a valid number"),
        (("rows", 1, "accuracy"), None, "rows.1.accuracy: Input should be a valid number"),
        (("rows", 0, "ece"), math.nan, "rows.0.ece: Input should be"),
        (("rows", 0, "groups"), [], "rows.0.groups: Input should be a valid dictionary"),
        (("rows", 0, "train_prior"), {}, "rows.0.train_prior.accuracy: Field required"),
        (("imbalance",), "100", "imbalance: Input should be a valid number"),
        (("seed",), "0", "seed: Input should be a valid integer"),
        (("rows",), [], "rows: List should have at least 1 item"),
    ],
)
def test_a_value_of_another_kind_is_named(
    report: Report, tmp_path: Path, where: tuple[Any, ...], value: object, message: str
) -> None:
    result = result_of(report, "cosine")
    *path, last = where
    section: Any = result
    for key in path:
        section = section[key]
    section[last] = value
    (tmp_path / "x.json").write_text(json.dumps(result))
    with pytest.raises(ResultsError, match=f"x.json is not a result of camcal: {message}"):
        load_results(tmp_path)


def test_a_result_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="x.json is not a result of camcal: it is not text in UTF-8"):
        load_results(tmp_path)


def test_a_missing_folder_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="--from FOLDER"):
        load_results(tmp_path / "nowhere")


def test_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert spread([0.5, 0.52, 0.54]) == "52.0±2.0"
    assert spread([0.123]) == "12.3"
    assert spread([None, None]) == "n/a"
    assert math.isclose(float(spread([0.1, 0.3, None]).split("±")[1]), 14.1)


def test_marc_stands_below_the_training_it_was_made_from() -> None:
    rows = [
        _row("b + MARC", 0.9),
        _row("b", 0.2),
        _row("a + MARC", 0.3),
        _row("a", 0.4),
        _row("a", 0.1),
        _row("c", 0.1),
    ]
    assert [name for name, _ in methods(rows)] == ["c", "b", "b + MARC", "a", "a + MARC"]


def test_rows_are_compared_within_one_setting_only(report: Report, tmp_path: Path) -> None:
    save_json(tmp_path / "a.json", result_of(report, "cosine"))
    save_json(tmp_path / "b.json", result_of(report.model_copy(update={"epochs": 3}), "cosine"))
    titles = [title for title, _ in settings(load_results(tmp_path))]
    assert titles == [f"digits, imbalance 10, resnet8, {e} epochs, augmentation: shift 3" for e in (3, 12)]


def test_groups_by_rank_stand_in_where_a_group_by_count_is_empty() -> None:
    full = _row("a", 0.5, groups={"many": 0.5, "few": 0.1}, rank_groups={"head": 0.5, "tail": 0.2})
    empty = full | {"groups": {"many": 0.5, "few": None}}
    assert group_names([full]) == ("groups", ["many", "few"])
    assert group_names([empty]) == ("rank_groups", ["head", "tail"])
