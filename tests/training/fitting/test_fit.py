import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from camcal.models.backbones import build_backbone
from camcal.models.classifier import LongTailClassifier
from camcal.models.timm_trunk import TimmTrunk
from camcal.training.checkpoints import build_network, load_finished, load_tensors
from camcal.training.data import Dataset
from camcal.training.distributed import Processes
from camcal.training.fitting import fit as fit_module
from camcal.training.fitting.descent import Descent
from camcal.training.fitting.fit import fit
from camcal.training.fitting.losses import Criterion
from camcal.training.fitting.training import Training, learning_rate
from camcal.training.recipe import FitConfig, Recipe, load_recipe
from camcal.training.run import RunError, RunFolder
from tests.training.runs import make_run


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Break off the epoch that is begun as the `at`-th from now on; gives a list that grows with each."""
    real, begun = Training.epoch, list[int]()

    def interrupted(self: Training, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        begun.append(epoch)
        if len(begun) == at:
            raise KeyboardInterrupt
        return real(self, epoch)

    monkeypatch.setattr(Training, "epoch", interrupted)
    return begun


def _fit(recipe: Recipe, data: Dataset, path: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    fit(make_run(recipe, path, data, console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.reslt=cifar", "model.head=linear", "model.camc=both", "fit.sampler=progressive"],
        ["loss.name=ldam", "loss.weights=class_balanced", "loss.reweight_from=0.6", "model.camc_attention=softmax"],
        ["model.camc=taught"],
        ["fit.ema=0.9"],
        ["fit.optimizer=adamw", "fit.lr=0.01"],
    ],
    ids=["plain", "branches", "deferred", "taught", "averaged", "adamw"],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    _equal_after_interruption(overrides, data, tmp_path, monkeypatch)


def _equal_after_interruption(
    overrides: list[str], data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("digits", ["fit.epochs=3", "data.imbalance=20", "fit.warmup_epochs=1", *overrides])
    _fit(recipe, data, tmp_path / "whole")
    interrupt(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        _fit(recipe, data, tmp_path / "parts")
    monkeypatch.undo()
    assert "continuing after epoch 2 of 3" in _fit(recipe, data, tmp_path / "parts")
    whole, _ = load_tensors(RunFolder(tmp_path / "whole").checkpoint)
    parts, meta = load_tensors(RunFolder(tmp_path / "parts").checkpoint)
    assert whole.keys() == parts.keys() and meta["epoch"] == 3
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_interrupted_run_of_an_adapted_transformer_does_too(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, _ = build_backbone("timm/test_vit", None, 32)
    assert isinstance(trunk, TimmTrunk)
    save_file(trunk.network.state_dict(), tmp_path / "own.safetensors")
    weights = ["model.backbone=timm/test_vit", f"model.weights={tmp_path / 'own.safetensors'}"]
    changes = ["fit.lora=2", "fit.layer_decay=0.7", "fit.ema=0.9", "fit.optimizer=adamw", "fit.lr=0.01"]
    _equal_after_interruption([*weights, "model.camc=off", *changes], data, tmp_path, monkeypatch)


def test_a_run_in_fp16_goes_on_with_the_scale_of_its_gradients(
    recipe: Recipe, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_each = np.concatenate([np.flatnonzero(data.train.labels == k)[:2] for k in range(10)])
    few = dataclasses.replace(data, train=data.train.subset(two_each))
    half = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"precision": "fp16", "batch_size": 10})})
    _fit(half, few, tmp_path / "whole")
    interrupt(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        _fit(half, few, tmp_path / "parts")
    monkeypatch.undo()
    _fit(half, few, tmp_path / "parts")
    whole, parts = (load_tensors(RunFolder(tmp_path / name).checkpoint)[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and whole["scaler"][1] > 2  # good steps, from before the interruption on
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_average_is_what_training_results_in(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    averaged = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"ema": 0.999})})
    network = fit(make_run(averaged, tmp_path / "averaged", data))
    plain = fit(make_run(recipe, tmp_path / "plain", data))
    folder = RunFolder(tmp_path / "averaged")
    tensors, _ = load_tensors(folder.checkpoint)
    loaded = load_finished(folder).network
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
        assert torch.equal(tensors[f"network.{name}"], plain.state_dict()[name]), name
    assert not torch.equal(network.head.weight, plain.head.weight)


def test_a_checkpoint_says_what_trained_it(
    recipe: Recipe, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        _fit(recipe, data, tmp_path)
    monkeypatch.undo()
    first = load_tensors(RunFolder(tmp_path).checkpoint)[1]["made_with"]
    monkeypatch.setattr("camcal.training.provenance.COMMIT", "a later one")
    _fit(recipe, data, tmp_path)
    assert load_tensors(RunFolder(tmp_path).checkpoint)[1]["made_with"] == [
        *first,
        first[0] | {"commit": "a later one"},
    ]


def test_training_learns_and_says_how_it_goes(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    output = _fit(recipe, data, tmp_path)
    losses = [float(line.split("loss ")[1].split()[0]) for line in output.splitlines() if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert "img/s" in output and "min left" in output


def test_another_recipe_in_the_same_folder_is_refused(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"epochs": 1})})
    _fit(short, data, tmp_path)
    with pytest.raises(RunError, match="holds a run with another fit.epochs: choose another --out"):
        _fit(recipe, data, tmp_path)
    with pytest.raises(RunError, match="another seed"):
        _fit(short.model_copy(update={"seed": 1}), data, tmp_path)


@pytest.mark.parametrize(("section", "change"), [("data", {"root": Path("elsewhere")}), ("fit", {"compile": True})])
def test_where_data_lies_and_how_fast_it_goes_make_no_other_recipe(
    recipe: Recipe, data: Dataset, tmp_path: Path, section: str, change: dict[str, Any]
) -> None:
    _fit(recipe, data, tmp_path)
    changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=change)})
    assert "continuing after epoch 3 of 3" in _fit(changed, data, tmp_path)


def test_a_last_batch_of_one_image_is_left_out(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    """At 32 px a torchvision ResNet's map is 1×1, and batch statistics of one value do not exist."""
    part = data.train.subset(np.concatenate([np.flatnonzero(data.train.labels == k)[: 3 - k] for k in (0, 1)]))
    five = Dataset(classes=["a", "b"], preprocessing=data.preprocessing, train=part, holdout=part, test=part)
    model = recipe.model.model_copy(update={"backbone": "resnet18", "camc": "off"})
    pairs = recipe.model_copy(update={"model": model, "fit": FitConfig(epochs=1, batch_size=4, warmup_epochs=0)})
    assert "epoch 1/1" in _fit(pairs, five, tmp_path)


def test_other_data_in_the_same_folder_is_refused(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    _fit(recipe, data, tmp_path)
    order = np.arange(len(data.train))
    order[[0, -1]] = order[[-1, 0]]
    renamed = dataclasses.replace(data, classes=[*data.classes[:-1], "zebra"])
    for other in (dataclasses.replace(data, train=data.train.subset(order)), renamed):
        with pytest.raises(RunError, match="was trained on other images than the data has now"):
            _fit(recipe, other, tmp_path)


def test_a_scalar_that_turns_over_is_said_before_anything_is_kept(
    recipe: Recipe, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(*arguments: Any) -> LongTailClassifier:
        network = build_network(*arguments)
        with torch.no_grad():
            network.head.scalar.fill_(-0.5)
        return network

    monkeypatch.setattr(fit_module, "build_network", turned)
    with pytest.raises(RunError, match=r"the scalar of the head became -\d.* in epoch 1; lower fit.lr \(it is "):
        _fit(recipe, data, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_run_that_diverges_says_so(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    wild = recipe.model_copy(
        update={
            "fit": recipe.fit.model_copy(update={"lr": 1e30}),
            "model": recipe.model.model_copy(update={"head": "linear"}),
        }
    )
    with pytest.raises(RunError, match="the loss became (nan|inf) in epoch 1; lower fit.lr"):
        _fit(wild, data, tmp_path)


def test_each_step_has_its_rate_and_each_epoch_its_weights_and_its_order(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["fit.sampler=progressive", "loss.weights=grw", "loss.reweight_from=0.5", "fit.warmup_epochs=0"]
    recipe = load_recipe("digits", [*settings, "fit.epochs=4", "data.imbalance=20"])
    rates, progress = [], []
    labels: dict[float, list[Tensor]] = {}
    take_step, judge = Descent.step, Criterion.__call__

    def step(self: Descent, loss: Tensor, rate: float) -> None:
        rates.append(rate)
        take_step(self, loss, rate)

    def judged(self: Criterion, logits: Tensor, labels_B: Tensor, **options: Any) -> Tensor:
        progress.append(options["progress"])
        labels.setdefault(options["progress"], []).append(labels_B)
        return judge(self, logits, labels_B, **options)

    monkeypatch.setattr(Descent, "step", step)
    monkeypatch.setattr(Criterion, "__call__", judged)
    _fit(recipe, data, tmp_path)
    batches = len(rates) // 4
    assert rates == pytest.approx([learning_rate(recipe.fit, i / batches) for i in range(4 * batches)])
    assert progress == [epoch / 4 for epoch in range(4) for _ in range(batches)]
    seen = [torch.cat(each).bincount(minlength=10) for each in labels.values()]
    rarest = [float(counts[-1] / counts.sum()) for counts in seen]
    share = float((data.train.labels == 9).float().mean())
    assert share < 0.02 and rarest == pytest.approx([(1 - t) * share + t / 10 for t in (0, 0.25, 0.5, 0.75)], abs=0.03)


def test_batches_too_small_for_the_processes_are_refused(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    few = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"batch_size": 4})})
    run = dataclasses.replace(make_run(few, tmp_path, data), processes=Processes(rank=0, size=8))
    with pytest.raises(RunError, match="no batch has 8 images, one for each process .*: fit.batch_size is 4 and there"):
        fit(run)
