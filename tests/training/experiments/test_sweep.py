import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from camcal.models.report import Report
from camcal.training import pipeline
from camcal.training.checkpoints import load_tensors, save_tensors
from camcal.training.experiments.results import result_of
from camcal.training.experiments.sweep import load_table, run_table
from camcal.training.recipe import RecipeError
from camcal.training.run import RunFolder

TABLES = Path(__file__).parents[2] / "benchmarks" / "tables"

TABLE = """
seeds = [0]

[[data]]
recipe = "digits"

[[row]]
method = "CAMC"

[[row]]
method = "CAMC"
calibrated = "CAMC + MARC, gentler"
plain = false
set = ["calibrate.exponent=0.5", "calibrate.method=marc"]

[[row]]
method = "linear"
set = ["fit.epochs=1", "model.head=linear", "calibrate.method=temperature"]
"""


def _table(folder: Path, text: str = TABLE) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_rows_with_other_teachers_and_nothing_else_are_refused(tmp_path: Path) -> None:
    rows = "".join(
        f'[[row]]\nmethod = "by {name}"\nset = ["distill.weight=0.5", "distill.teacher={name}"]\n' for name in "ab"
    )
    table = _table(tmp_path, f'seeds = [0]\n[[data]]\nrecipe = "digits"\n{rows}')
    with pytest.raises(RecipeError, match="_by-a_small_s0 and .*_by-b_small_s0 differ only in distill.teacher"):
        load_table(table)
    assert len(load_table(table, only="by-a")) == 1


def test_a_row_repeats_and_a_finished_table_is_left_alone(tmp_path: Path, digits_run: RunFolder) -> None:
    jobs = load_table(_table(tmp_path))
    console = _console()
    assert run_table(jobs, tmp_path / "out", 1, console) == 0
    lines = _text(console).splitlines()
    assert len(lines) == 3 and lines[-1].startswith("3/3  ")
    results = _results(tmp_path / "out")
    again = results["digits-if10_camc_small_s0"]
    first = result_of(Report.read(digits_run.report), "CAMC")
    assert again["rows"] == first["rows"] and again["recipe"] == first["recipe"]
    (gentler,) = results["digits-if10_camc-marc-gentler_small_s0"]["rows"]
    assert gentler["method"] == "CAMC + MARC, gentler" and gentler["accuracy"] != again["rows"][-1]["accuracy"]
    # The two calibrations share one training.
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2
    console = _console()
    compiled = load_table(_table(tmp_path), overrides=["fit.compile=true"])
    assert run_table(jobs, tmp_path / "out", 1, console) == run_table(compiled, tmp_path / "out", 1, console) == 0
    assert _text(console) == "3 of 3 rows are finished already\n" * 2


def test_several_processes_share_a_table(tmp_path: Path) -> None:
    jobs = load_table(_table(tmp_path, TABLE.replace("[0]", "[0, 1]")), only="linear")
    console = _console()
    assert run_table(jobs, tmp_path / "out", 2, console) == 0
    assert [line.split()[0] for line in _text(console).splitlines()] == ["1/2", "2/2"]
    assert _results(tmp_path / "out").keys() == {job.name for job in jobs}


def test_a_row_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    text = TABLE.replace(
        'set = ["calibrate.exponent=0.5", "calibrate.method=marc"]',
        'set = ["model.reslt=cifar", "loss.branch_ranks=[3, 11]"]',
    )
    jobs = [job for job in load_table(_table(tmp_path, text)) if job.name != "digits-if10_camc_small_s0"]
    console = _console()
    assert run_table(jobs, tmp_path / "out", 1, console) == 1
    failed, good = _text(console).splitlines()
    assert "camc-marc-gentler_small_s0: failed: loss.branch_ranks goes to 11; there are 10 classes" in failed
    assert good.startswith("1/2  digits-if10_linear_small_s0: linear ")


def test_a_row_without_the_memory_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, tries = pipeline.fit_run, []

    def short_of_memory(*args: Any) -> None:
        tries.append(args)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        train(*args)

    monkeypatch.setattr(pipeline, "fit_run", short_of_memory)
    jobs = load_table(_table(tmp_path, TABLE.replace("[0]", "[0, 1]")), only="linear")
    console = _console()
    assert run_table(jobs, tmp_path / "out", 1, console) == 1
    failed, good = _text(console).splitlines()
    assert "failed: CUDA out of memory" in failed and "linear " in good


def test_a_changed_row_is_run_again(tmp_path: Path) -> None:
    only = "linear"
    assert run_table(load_table(_table(tmp_path), only=only), tmp_path / "out", 1, _console()) == 0
    text = TABLE.replace('"fit.epochs=1"', '"fit.epochs=2"')
    assert run_table(load_table(_table(tmp_path, text), only=only), tmp_path / "out", 1, _console()) == 0
    assert _results(tmp_path / "out")["digits-if10_linear_small_s0"]["epochs"] == 2


def test_a_row_with_epochs_raised_for_its_steps_is_finished_too(tmp_path: Path) -> None:
    jobs = load_table(_table(tmp_path), only="linear", overrides=["fit.least_steps=20"])
    assert run_table(jobs, tmp_path / "out", 1, _console()) == 0
    (result,) = _results(tmp_path / "out").values()
    assert result["epochs"] == result["recipe"]["fit"]["epochs"] > 1
    console = _console()
    assert run_table(jobs, tmp_path / "out", 1, console) == 0
    assert _text(console) == "1 of 1 rows are finished already\n"


def test_a_row_taught_by_another_network_is_not_taken_for_this_one(tmp_path: Path, digits_run: RunFolder) -> None:
    taught = ["distill.weight=0.5", f"distill.teacher={digits_run.path}", "fit.epochs=1"]
    jobs = load_table(_table(tmp_path), only="linear", overrides=taught)
    assert run_table(jobs, tmp_path / "out", 1, _console()) == 0
    console = _console()
    assert run_table(jobs, tmp_path / "out", 1, console) == 0
    assert _text(console) == "1 of 1 rows are finished already\n"
    tensors, meta = load_tensors(digits_run.checkpoint)
    other = RunFolder(tmp_path / "other")
    save_tensors(other.checkpoint, {name: tensor + 1 for name, tensor in tensors.items()}, meta)
    console = _console()
    jobs = load_table(_table(tmp_path), only="linear", overrides=[*taught, f"distill.teacher={other.path}"])
    assert run_table(jobs, tmp_path / "out", 1, console) == 1
    assert "holds a run with another teacher: choose another --out" in _text(console)


def test_a_row_has_its_teacher_trained_first(tmp_path: Path) -> None:
    taught = ["distill.weight=0.5", "distill.set=fit.lr=0.05", "fit.epochs=1"]
    jobs = load_table(_table(tmp_path), only="linear", overrides=taught)
    assert run_table(jobs, tmp_path / "out", 1, _console()) == 0
    assert _results(tmp_path / "out")["digits-if10_linear_small_s0"]["teachers"][0]["recipe"]["fit"]["lr"] == 0.05
    console = _console()
    assert run_table(jobs, tmp_path / "out", 1, console) == 0
    assert _text(console) == "1 of 1 rows are finished already\n"


def test_jobs_come_seed_by_seed() -> None:
    jobs = load_table(TABLES / "short.toml", ["cifar100=a.npz", "cifar10=b.npz"], only="cifar100-lt")
    assert jobs[0].name == "cifar100-lt-if100_cross-entropy_short_s0"
    assert [job.recipe.seed for job in jobs] == sorted(job.recipe.seed for job in jobs)
    assert {str(job.recipe.data.root) for job in jobs} == {"a.npz"}


@pytest.mark.parametrize("table", sorted(TABLES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_tables_are_valid(table: Path) -> None:
    jobs = load_table(table, ["cifar100=a", "cifar10=b", "folder=c"])
    # Behind a frozen trunk to train twice costs little, and the shipped recipe does it by itself.
    alone = [job for job in jobs if not job.recipe.calibrate.refit or job.recipe.fit.mode == "frozen"]
    first = [job for job in alone if job.row.plain]
    trainings = {job.training for job in first}
    assert len(trainings) == len(first)
    # A row that calibrates again, or trains again after that, must find its training among the others.
    assert {job.training for job in jobs} == trainings


def test_data_of_one_kind_of_source_may_lie_in_two_places() -> None:
    jobs = load_table(TABLES / "camc.toml", ["cifar100=a", "cifar10=b", "folder=c", "tiny-imagenet100-lt=d"])
    assert {job.name.partition("_")[0] for job in jobs} == {
        "cifar100-lt-if100",
        "cifar10-lt-if100",
        "caltech100",
        "tiny-imagenet100-lt",  # the tails of the last two are given
    }
    roots = {job.recipe.name: str(job.recipe.data.root) for job in jobs}
    assert roots == {"cifar100-lt": "a", "cifar10-lt": "b", "caltech100": "c", "tiny-imagenet100-lt": "d"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [0", "small.toml is not valid TOML"),
        (TABLE.replace("seeds", "seed"), "'seeds': Field required; small.toml: 'seed': Extra inputs"),
        (TABLE.replace('method = "linear"', 'method = "CAMC"'), "two rows are called digits-if10_camc_small_s0"),
        (TABLE.replace("fit.epochs", "fit.epoch"), "unknown key 'fit.epoch'; did you mean 'epochs'?"),
        (
            TABLE.replace('method = "linear"', 'method = "none"\nplain = false'),
            "small.toml: none: plain = false leaves no row of calibrate.method = 'temperature'",
        ),
        (TABLE.replace('"digits"', '"cifar10-lt"'), "needs data: pass --data cifar10=PATH"),
    ],
)
def test_a_mistake_in_a_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_table(_table(tmp_path, text))
    assert message in str(error.value)


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no table at"):
        load_table(tmp_path / "nothing.toml")
    with pytest.raises(RecipeError, match="--data 'cifar10' is not of the form SOURCE=PATH"):
        load_table(_table(tmp_path), ["cifar10"])
    with pytest.raises(RecipeError, match="has no row whose name contains 'x'; the first is digits-if10_camc_small_s0"):
        load_table(_table(tmp_path), only="x")
    with pytest.raises(RecipeError, match="--set calibrate.exponent=1: it has no effect, since calibrate.method is"):
        load_table(_table(tmp_path), overrides=["calibrate.exponent=1"], only="linear")
    assert len(load_table(_table(tmp_path), overrides=["calibrate.exponent=1"])) == 3
