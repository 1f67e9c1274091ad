"""Several processes against one: the same gradients, the same statistics, one set of files."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

from camcal.training.checkpoints import load_tensors
from camcal.training.data import Dataset, LabelledImages
from camcal.training.data.sources import preprocessing_of
from camcal.training.distributed import ALONE, Processes, process_group
from camcal.training.fitting.distill import Teacher
from camcal.training.fitting.fit import fit
from camcal.training.recipe import load_recipe
from camcal.training.run import Run, RunFolder
from tests.training.runs import make_run

CPU = torch.device("cpu")
# One batch of all images, which two processes cannot share evenly; nothing random but the initial weights.
ONE_STEP = ["augment.shift=0", "fit.epochs=1", "fit.batch_size=99", "fit.warmup_epochs=0"]


def _noise(folder: Path, overrides: list[str]) -> Run:
    recipe = load_recipe("digits", [*ONE_STEP, *overrides])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (33, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = (torch.randn(33, generator=generator).abs() * 4).long().clamp(max=9)
    labels[:10] = torch.arange(10)
    part = LabelledImages(images=images, labels=labels)
    preprocessing = preprocessing_of(recipe.data)
    classes = list("0123456789")
    data = Dataset(classes=classes, preprocessing=preprocessing, train=part, holdout=part, test=part)
    return make_run(recipe, folder, data)


def _smooth(patch: pytest.MonkeyPatch) -> None:
    """Rounding alone puts a feature on the other side of ReLU's kink, and the gradient of its channel jumps."""
    patch.setattr(torch, "relu", functional.softplus)
    patch.setattr(functional, "relu", functional.softplus)


def _fit_as_one_of_two(rank: int, port: int, folder: str, overrides: list[str]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, process_group(CPU) as (processes, device):
        _smooth(patch)
        assert (processes.rank, processes.size, device) == (rank, 2, CPU)
        run = replace(_noise(Path(folder), overrides), processes=processes)
        network = fit(run, _teacher(run))
    torch.save(network.state_dict(), run.folder.path / f"weights-{rank}.pt")


def _teacher(run: Run) -> Teacher | None:
    return Teacher(run) if run.recipe.distill.weight else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.camc=off"],
        ["model.camc=off", "loss.weights=grw"],
        ["model.camc=off", "model.reslt=cifar", "loss.weights=class_balanced"],
        ["model.camc=prototypes", "fit.epochs=2"],  # the second step has prototypes that the first one gathered
        ["model.camc=off", "distill.weight=0.7"],
        ["model.camc=off", "fit.epochs=2", "fit.ema=0.9"],
    ],
    ids=["plain", "weighted", "reslt", "camc", "distilled", "averaged"],
)
def test_two_processes_give_the_gradients_and_statistics_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    _smooth(monkeypatch)
    if "distill.weight=0.7" in overrides:
        fit(_noise(tmp_path / "teacher", ["model.camc=off"]))
        overrides = [*overrides, f"distill.teacher={tmp_path / 'teacher'}"]
    run = _noise(tmp_path / "one", overrides)
    (tmp_path / "two").mkdir()
    fit(run, _teacher(run))
    arguments = (_free_port(), str(tmp_path / "two"), overrides)
    start_processes(_fit_as_one_of_two, arguments, nprocs=2, start_method="spawn")
    one, _ = load_tensors(RunFolder(tmp_path / "one").checkpoint)
    two, _ = load_tensors(RunFolder(tmp_path / "two").checkpoint)
    # After a step from rest, a momentum is the gradient plus the decay of the initial weight.
    assert one.keys() == two.keys() and len([name for name in one if name.startswith("momentum")]) > 20
    for name, tensor in one.items():
        assert (two[name] - tensor).double().norm() <= 1e-4 * tensor.double().norm() + 1e-7, name
    ranks = [torch.load(tmp_path / "two" / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


def test_torchrun_trains_together_and_the_leader_alone_writes_and_speaks(tmp_path: Path) -> None:
    command = "from camcal.__main__ import main; main()"
    changes = ["fit.epochs=2", "calibrate.iterations=20", "augment.policy=trivialaugment"]
    changes += ["distill.weight=0.5", "distill.set=fit.epochs=3"]
    options = [part for change in changes for part in ("--set", change)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    result = subprocess.run(
        [*launcher, sys.executable, "-c", command, "train", "digits", "--out", str(tmp_path), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 3/3") == 1 and result.stdout.count("epoch 2/2") == 1
    assert result.stdout.count("camcal serve --bundle") == 1
    assert "cpu × 2" in result.stdout
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["name"] == "digits"


@pytest.mark.parametrize("batch", [2, 7, 64])
def test_parts_make_up_the_batch(batch: int) -> None:
    images = torch.arange(batch)
    for size in (1, 2):
        assert torch.cat([Processes(rank, size).part(images) for rank in range(size)]).sort().values.equal(images)


def test_a_process_that_is_alone_changes_nothing() -> None:
    network = nn.Conv2d(3, 3, 3)
    assert ALONE.leads and ALONE.wrap(network, CPU) is network
    with process_group(CPU) as (processes, device):
        assert processes == ALONE and device == CPU
