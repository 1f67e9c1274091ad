from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camcal.models.camc import CAMC
from camcal.models.stages import stages
from camcal.training.checkpoints import build_network
from camcal.training.fitting.descent import Descent, autocast
from camcal.training.recipe import FitConfig, load_recipe

CPU = torch.device("cpu")


def test_single_numbers_are_not_decayed() -> None:
    recipe = load_recipe("digits")
    network = build_network(recipe, 10)
    groups = Descent(network, recipe.fit, CPU).optimizer.param_groups
    assert isinstance(network.camc, CAMC)
    assert {id(p) for p in groups[1]["params"]} == {id(network.head.scalar), id(network.camc.alpha)}
    assert groups[0]["weight_decay"] == recipe.fit.weight_decay and groups[1]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_network_is_computed_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    with autocast(CPU, precision):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def _linear(precision: str, **changes: Any) -> tuple[nn.Linear, Descent]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    return layer, Descent(layer, FitConfig.model_validate({"epochs": 1, "precision": precision} | changes), CPU)


def _moved(precision: str) -> tuple[Tensor, Tensor]:
    layer, descent = _linear(precision)
    for rate in (0.1, 0.05):
        descent.step(layer(torch.tensor([[1.0, -2.0, 0.5]])).square().sum(), rate)
    return layer.weight.detach(), layer.bias.detach()


def test_scaled_gradients_move_weights_as_far_as_plain_ones() -> None:
    for scaled, plain in zip(_moved("fp16"), _moved("fp32"), strict=True):
        assert torch.equal(scaled, plain)  # the scale is a power of two


@pytest.mark.parametrize(("precision", "arrives"), [("fp16", True), ("fp32", False)])
def test_gradients_that_half_precision_would_lose_arrive(precision: str, arrives: bool) -> None:
    layer, descent = _linear(precision)
    with torch.no_grad():
        layer.bias.zero_()
    halved = layer(torch.zeros(1, 3)).half().sum()
    descent.step((halved * 1e-4).float() * 1e-4, 0.1)  # a gradient of 1e-8, which fp16 does not hold
    assert bool((layer.bias != 0).all()) is arrives


def test_a_step_that_overflows_is_left_out() -> None:
    layer, descent = _linear("fp16")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    descent.step(layer.weight.sum() * torch.inf, 0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert descent.tensors().keys() == {"scaler"}
    assert descent.tensors()["scaler"].tolist() == [65536 / 2, 0]
    descent.step(layer.weight.sum(), 0.1)
    assert not torch.equal(layer.weight, before["weight"])
    assert descent.tensors()["scaler"].tolist() == [65536 / 2, 1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_was_kept_is_taken_up(precision: str, optimizer: str) -> None:
    layer, descent = _linear(precision, optimizer=optimizer, lr=0.01)
    descent.step(layer.weight.square().sum(), 0.1)
    descent.step(layer.weight.sum() * (torch.inf if precision == "fp16" else 1), 0.1)
    other_layer, other = _linear(precision, optimizer=optimizer, lr=0.01)
    other_layer.load_state_dict(layer.state_dict())
    other.restore({name: tensor.clone() for name, tensor in descent.tensors().items()})
    for each, of in ((descent, layer), (other, other_layer)):
        each.step(of.weight.square().sum(), 0.1)
    assert torch.equal(layer.weight, other_layer.weight)
    assert descent.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in descent.tensors().items())


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.6, 0.01), (0.0, 0.01)])
def test_steps_are_nesterov_s_with_the_rate_of_each(momentum: float, decay: float) -> None:
    layer = nn.Linear(3, 1, bias=False)
    config = FitConfig(epochs=1, momentum=momentum, weight_decay=decay, precision="fp32", lr=7.0)
    descent = Descent(layer, config, CPU)
    w, target = layer.weight.detach().double().numpy().copy(), np.array([[1.0, -2.0, 0.5]])
    velocity = np.zeros_like(w)
    for rate in (0.1, 0.3, 0.02):
        descent.step(0.5 * (layer.weight - torch.from_numpy(target)).square().sum(), rate)
        gradient = w - target + decay * w
        velocity = momentum * velocity + gradient
        w -= rate * (gradient + momentum * velocity)
    np.testing.assert_allclose(layer.weight.detach().numpy(), w, rtol=1e-5)


def test_adamw_s_steps_are_those_of_its_paper() -> None:
    layer = nn.Linear(3, 1, bias=False)
    config = FitConfig(epochs=1, optimizer="adamw", weight_decay=0.1, precision="fp32", lr=0.01)
    descent = Descent(layer, config, CPU)
    w, target = layer.weight.detach().double().numpy().copy(), np.array([[1.0, -2.0, 0.5]])
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, rate in enumerate((0.1, 0.3, 0.02), start=1):
        descent.step(0.5 * (layer.weight - torch.from_numpy(target)).square().sum(), rate)
        gradient = w - target
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * w)
    np.testing.assert_allclose(layer.weight.detach().numpy(), w, rtol=1e-5)


@pytest.mark.parametrize(
    ("layer_decay", "shares"), [(1.0, [0.25, 0.25, 0.25, 0.25]), (0.5, [0.25 / 8, 0.25 / 4, 0.25 / 2, 0.25])]
)
def test_a_trunk_and_its_first_stages_may_learn_more_slowly(layer_decay: float, shares: list[float]) -> None:
    recipe = load_recipe("digits", ["fit.trunk_lr=0.25", f"fit.layer_decay={layer_decay}"])
    network = build_network(recipe, 10)
    descent = Descent(network, recipe.fit, CPU)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_()
    descent.step(sum((p.sum() for p in network.parameters()), torch.zeros(())), 0.1)
    decay, kept = recipe.fit.weight_decay, recipe.fit.momentum
    for name, parameter in network.named_parameters():
        slope = 1 + decay * before[name] * (parameter.ndim > 0)
        stage = stages(network.trunk).get(name.removeprefix("trunk."))
        rate = 0.1 * (1.0 if stage is None else shares[stage])
        torch.testing.assert_close(parameter, before[name] - rate * (1 + kept) * slope, msg=name)
