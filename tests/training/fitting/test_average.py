import torch

from camcal.training.checkpoints import build_network
from camcal.training.fitting.average import Average
from camcal.training.recipe import load_recipe


@torch.no_grad()
def test_weights_and_statistics_are_averaged_with_a_decay_that_rises() -> None:
    network = build_network(load_recipe("digits"), 10)
    average = Average(network, 0.4)
    expected = {name: tensor.double() for name, tensor in network.state_dict().items()}
    for step, decay in enumerate([0, 1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 0.4, 0.4]):
        for tensor in network.state_dict().values():
            tensor.add_(1) if tensor.dtype == torch.int64 else tensor.add_(torch.randn(()))
        average.update(network, step)
        for name, tensor in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    found = average.network.state_dict()
    assert found.keys() == expected.keys() and "trunk.bn1.running_var" in found
    for name, tensor in network.state_dict().items():
        if tensor.dtype == torch.int64:
            assert torch.equal(found[name], tensor)
        else:
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_average_may_begin_again() -> None:
    first, second = (build_network(load_recipe("digits", [f"seed={seed}"]), 10) for seed in (0, 1))
    average = Average(first, 0.9)
    average.begin(second)
    assert torch.equal(average.network.head.weight, second.head.weight)
    assert average.network.head.weight is not second.head.weight


def test_the_averaged_network_is_in_evaluation_mode_and_needs_no_gradient() -> None:
    network = build_network(load_recipe("digits"), 10).train()
    average = Average(network, 0.9).network
    assert not any(module.training for module in average.modules()) and network.training
    assert not any(p.requires_grad for p in average.parameters()) and network.head.weight.requires_grad
