import dataclasses
import math
from pathlib import Path

import pytest
import torch

from camcal.training.checkpoints import build_network
from camcal.training.data import Dataset
from camcal.training.fitting.training import Training, compiled, learning_rate
from camcal.training.recipe import FitConfig, Recipe
from camcal.training.run import RunError
from tests.training.runs import CPU, make_run


def test_the_learning_rate_warms_up_and_then_follows_a_cosine() -> None:
    config = FitConfig(epochs=20, lr=0.4, warmup_epochs=4)
    rates = [learning_rate(config, epoch) for epoch in (0, 2, 4, 12, 20)]
    assert rates[0] < 0.01
    assert rates[1] == pytest.approx(0.2, rel=0.02)
    assert rates[2:] == [pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0, abs=1e-12)]


def test_the_learning_rate_may_fall_in_steps() -> None:
    config = FitConfig(epochs=200, lr=0.1, warmup_epochs=5, milestones=[160, 180])
    rates = [learning_rate(config, epoch) for epoch in (5, 159.9, 160, 179.9, 180, 199.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    early = FitConfig(epochs=20, lr=0.1, warmup_epochs=5, milestones=[2])
    rates = [learning_rate(early, epoch) for epoch in (1.9, 2, 4, 5)]
    assert rates == pytest.approx([0.1 * 1.95 / 5.05, 0.01 * 2.05 / 5.05, 0.01 * 4.05 / 5.05, 0.01])


def test_a_warm_up_longer_than_the_run_is_cut_to_half() -> None:
    config = FitConfig(epochs=2, lr=1.0, warmup_epochs=5)
    assert learning_rate(config, 1) == pytest.approx(1.0)
    assert all(math.isfinite(learning_rate(config, e / 10)) for e in range(21))


def _epoch_of(
    recipe: Recipe, data: Dataset, device: torch.device, backend: str | None = None
) -> dict[str, torch.Tensor]:
    """The state after one epoch, compiled or not."""
    training = _training(recipe, data, device)
    if backend is not None:
        training.model = compiled(training.network, device, backend)
    for _ in training.epoch(0):
        pass
    return training.network.state_dict()


def _training(recipe: Recipe, data: Dataset, device: torch.device) -> Training:
    return Training(make_run(recipe, Path("nowhere"), data, device=device), build_network(recipe, 10))


def test_a_compiled_network_trains_as_the_plain_one_does(recipe: Recipe, data: Dataset) -> None:
    small = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"batch_size": 200, "lr": 0.01})})
    # The backend that needs no C++ compiler; it shares with the real one what could go wrong: buffers changed in place.
    plain, fast = (_epoch_of(small, data, torch.device("cpu"), backend) for backend in (None, "aot_eager"))
    assert plain["camc.prototypes"].abs().sum() > 0
    for name, tensor in plain.items():
        assert (fast[name] - tensor).double().norm() <= 1e-3 * tensor.double().norm() + 1e-6, name


def test_mixing_and_policies_keep_a_run_repeatable(recipe: Recipe, data: Dataset) -> None:
    changes = {"policy": "autoaugment-cifar10", "mixup": 0.2, "cutmix": 1.0}
    mixed = recipe.model_copy(update={"augment": recipe.augment.model_copy(update=changes)})
    first, again, plain = (_epoch_of(r, data, torch.device("cpu")) for r in (mixed, mixed, recipe))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], plain["head.weight"])


def test_frozen_stages_keep_weights_and_statistics_and_the_others_do_not(recipe: Recipe, data: Dataset) -> None:
    frozen = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"frozen_stages": 2})})
    before = build_network(recipe, 10).state_dict()
    after = _epoch_of(frozen, data, CPU)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    still = ("trunk.conv1.", "trunk.bn1.", "trunk.blocks.0.")
    assert not any(name.startswith(still) for name in changed)
    for name in ("bn1.weight", "conv1.weight", "bn2.running_mean", "bn2.num_batches_tracked"):
        assert f"trunk.blocks.1.{name}" in changed
    assert "head.weight" in changed


def test_freezing_all_stages_is_refused(recipe: Recipe, data: Dataset) -> None:
    frozen = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"frozen_stages": 4})})
    with pytest.raises(RunError, match="frozen_stages is 4, but the trunk has 4 stages with its stem: freeze 3 at mos"):
        _training(frozen, data, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(recipe: Recipe, data: Dataset) -> None:
    device = torch.device("cuda")
    changes = {"policy": "autoaugment-cifar10", "mixup": 0.2, "cutmix": 1.0, "erase": 0.5, "flip": True}
    mixed = recipe.model_copy(update={"augment": recipe.augment.model_copy(update=changes)})
    there = dataclasses.replace(data, train=data.train.to(device))
    _epoch_of(mixed, there, device)
    steps = _training(mixed, there, device).epoch(0)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
