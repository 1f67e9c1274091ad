import json
import shutil
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from typer.testing import CliRunner, Result

from camcal.__main__ import app
from camcal.training.checkpoints import load_tensors, save_tensors
from camcal.training.run import RunFolder

SHIPPED = Path(__file__).resolve().parents[3] / "models" / "pretrained" / "caltech100"


def _camcal(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def run(digits_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A finished run of its own for each test to change."""
    return RunFolder(Path(shutil.copytree(digits_run.path, tmp_path / "run")))


def test_all_commands_are_listed() -> None:
    output = _camcal("--help").output
    assert all(name in output for name in ("train", "calibrate", "evaluate", "export", "verify", "serve", "inspect"))


def test_a_finished_run_is_not_trained_again(run: RunFolder) -> None:
    before = run.checkpoint.read_bytes()
    result = _camcal("train", "digits", "--out", run.path)
    assert result.exit_code == 0, result.output
    assert "continuing after epoch" in result.output and "serve it:  camcal serve --bundle" in result.output
    assert run.checkpoint.read_bytes() == before


def test_the_steps_are_commands(run: RunFolder, tmp_path: Path) -> None:
    again = _camcal("calibrate", run.path, "--set", "data.root=moved")
    assert again.exit_code == 0 and "has a cross-fitted loss of" in again.output
    wanted = ("--set", "calibrate.method=temperature")
    assert "cross-fitted" not in _camcal("calibrate", run.path, *wanted).output
    result = _camcal("evaluate", run.path)
    assert result.exit_code == 0 and "by chance" in result.output and "+ MARC" not in result.output
    report = json.loads(run.report.read_text())
    # Without margins the prior that the network was trained for is taken out, and put back for that very prior.
    assert report["test"]["marc"]["nll"] == pytest.approx(report["test"]["adjusted"]["nll"], rel=1e-4)
    under_prior, alone = (r["test_under_train_prior"] for r in (report, report["temperature_only"]["adjusted"]))
    assert under_prior["calibrated"]["nll"] == pytest.approx(alone["nll"], rel=0.05)
    assert _camcal("export", run.path, "--out", tmp_path / "elsewhere").exit_code == 0
    manifest = json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())
    assert manifest["calibration"]["omega"] == [1.0] * 10
    assert manifest["recipe"]["calibrate"]["method"] == "temperature"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing", "--out", "OUT"], "no recipe 'nothing': give a TOML file or one of:"),
        (
            ["train", "digits", "--out", "OUT", "--set", "fit.epoch=1"],
            "unknown key 'fit.epoch'; did you mean 'epochs'?",
        ),
        (
            ["train", "digits", "--out", "OUT", "--set", "model.backbone=resnet33"],
            "unknown backbone 'resnet33'; known:",
        ),
        (["train", "caltech100", "--out", "OUT", "--set", "data.root=nowhere"], "no folder at nowhere"),
        (
            ["train", "digits", "--out", "OUT", "--set", "loss.gamma=1"],
            "--set loss.gamma=1: it has no effect, since loss.name is 'cross_entropy'; loss.gamma is for "
            "loss.name = 'focal'",
        ),
        (
            ["train", "digits", "--out", "OUT", "--set", "calibrate.prior=[1, 2]"],
            "calibrate.prior has 2 numbers for 10 classes",
        ),
        (
            ["train", "digits", "--out", "OUT", "--set", "loss.branch_ranks=[3, 11]", "--set", "model.reslt=cifar"],
            "loss.branch_ranks goes to 11; there are 10 classes",
        ),
        (
            ["train", "digits", "--out", "OUT", "--set", "distill.weight=0.5", "--set", "distill.teacher=nowhere"],
            "checkpoint.safetensors is missing",
        ),
        (
            ["train", "digits", "--out", "OUT", "--set", "distill.weight=0.5", "--set", "distill.set=loss.gamma=5"],
            "--set loss.gamma=5: it has no effect",
        ),
        (["train", "digits", "--out", "FILE"], "file cannot be created: it, or a folder above it, is a file"),
        (["calibrate", "OUT"], "checkpoint.safetensors is missing: has `camcal train` finished"),
        (
            ["calibrate", "OUT", "--set", "fit.lr=1"],
            "--set fit.lr=1: only calibrate.… and data.root can change after training",
        ),
        (["evaluate", "OUT"], "checkpoint.safetensors is missing: has `camcal train` finished"),
        (["evaluate", "OUT", "--set", "fit.lr=1"], "--set fit.lr=1: only data.root can change after training"),
        (["export", "OUT"], "checkpoint.safetensors is missing: has `camcal train` finished"),
        (["results", "--from", "OUT"], "no result files at"),
        (["results", "--json", "--markdown"], "--json and --markdown exclude each other: choose one"),
        (["verify", str(SHIPPED), "--set", "fit.epochs=4"], "--set fit.epochs=4: only data.root can change"),
        (["bench-table", "OUT", "--out", "OUT"], "no table at"),
        (["export", "OUT", "--precision", "fp8"], "the precision is 'fp8'; expected fp32, fp16, int8"),
    ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("")
    places = {"OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    result = _camcal(*[places.get(a, a) for a in arguments])
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_calibrating_half_a_run_is_refused(run: RunFolder) -> None:
    tensors, meta = load_tensors(run.checkpoint)
    save_tensors(run.checkpoint, tensors, meta | {"epoch": 5})
    result = _camcal("calibrate", run.path)
    assert result.exit_code == 2 and "has 5 of 12 epochs: finish it with `camcal train` first" in result.stderr


def test_exporting_without_a_report_says_what_to_do(run: RunFolder) -> None:
    run.report.unlink()
    result = _camcal("export", run.path)
    assert result.exit_code == 2 and "report.json is missing: run `camcal evaluate" in result.stderr


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("camcal.training.pipeline.train", stop)
    result = _camcal("train", "digits", "--out", tmp_path)
    assert result.exit_code == 130 and "rerun the same command to resume" in result.stderr


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    # None in sys.modules makes Python's own import raise ModuleNotFoundError.
    start = "import sys; sys.modules['torch'] = None; from camcal.__main__ import main; main()"
    command = [sys.executable, "-c", start, "train", "digits", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "torch is not installed; training needs more than serving" in ended.stderr


def test_a_table_and_its_results_are_commands(tmp_path: Path) -> None:
    table = tmp_path / "t.toml"
    table.write_text('seeds = [3]\n[[data]]\nrecipe = "digits"\n[[row]]\nmethod = "quick"\n')
    result = _camcal("bench-table", table, "--out", tmp_path / "out", "--set", "fit.epochs=1")
    assert result.exit_code == 0, result.output
    assert "1/1  digits-if10_quick_t_s3: quick" in result.output
    plain, _, marc = json.loads(_camcal("results", "--from", tmp_path / "out", "--json").output)
    assert (plain["method"], marc["method"], plain["seed"]) == ("quick", "quick + auto", 3)
    assert "quick + auto" in _camcal("results", "--from", tmp_path / "out").output
    assert (
        "| quick + auto | [3](../results/digits-if10_quick_t_s3.json) |"
        in _camcal("results", "--from", tmp_path / "out", "--markdown").output
    )


def test_a_table_with_a_failed_row_ends_with_an_error(tmp_path: Path) -> None:
    table = tmp_path / "t.toml"
    table.write_text('seeds = [0]\n[[data]]\nrecipe = "cifar10-lt"\n[[row]]\nmethod = "quick"\n')
    result = _camcal("bench-table", table, "--out", tmp_path / "out", "--data", f"cifar10={tmp_path / 'nowhere'}")
    assert result.exit_code == 2 and "failed: no data at" in result.output
    assert "1 of 1 rows failed: rerun the same command to retry them" in result.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "error: CUDA out of memory. A smaller fit.batch_size"),
        (BrokenProcessPool("A process was terminated"), "error: a process died, perhaps out of memory"),
    ],
)
def test_want_of_memory_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: RuntimeError, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("camcal.training.pipeline.train", fail)
    result = _camcal("train", "digits", "--out", tmp_path)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_other_faults_stay_tracebacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("camcal.training.pipeline.train", fail)
    assert isinstance(_camcal("train", "digits", "--out", tmp_path).exception, RuntimeError)


def test_compiling_without_a_compiler_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        result = _camcal("train", "digits", "--out", tmp_path / "run", "--set", "fit.compile=true")
    torch.compiler.reset()
    assert result.exit_code == 2, result.output
    assert "error: the network cannot be compiled (" in result.stderr
    assert "On a CPU this needs a C++ compiler; --set fit.compile=false trains without one" in result.stderr
