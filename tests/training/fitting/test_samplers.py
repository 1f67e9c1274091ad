import numpy as np
import pytest
import torch

from camcal.training.fitting.samplers import Sampler, class_shares, epoch_order

COUNTS = np.array([100, 25, 4])
LABELS = torch.arange(3).repeat_interleave(torch.from_numpy(COUNTS))


def _order(sampler: Sampler, progress: float = 0.0, seed: int = 0) -> torch.Tensor:
    return epoch_order(sampler, LABELS, progress, torch.Generator().manual_seed(seed))


def test_shares_by_hand() -> None:
    np.testing.assert_allclose(class_shares("instance", COUNTS, 0), [100 / 129, 25 / 129, 4 / 129])
    np.testing.assert_allclose(class_shares("square_root", COUNTS, 0), [10 / 17, 5 / 17, 2 / 17])
    np.testing.assert_allclose(class_shares("class_balanced", COUNTS, 0), [1 / 3, 1 / 3, 1 / 3])
    expected = [0.75 * 100 / 129 + 0.25 / 3, 0.75 * 25 / 129 + 0.25 / 3, 0.75 * 4 / 129 + 0.25 / 3]
    np.testing.assert_allclose(class_shares("progressive", COUNTS, 0.25), expected)


def test_instance_sampling_is_a_permutation() -> None:
    assert torch.equal(_order("instance").sort().values, torch.arange(129))


@pytest.mark.parametrize("sampler", ["square_root", "class_balanced", "progressive"])
def test_classes_come_by_their_share_and_the_samples_of_a_class_alike(sampler: Sampler) -> None:
    drawn = torch.cat([_order(sampler, 0.5, seed) for seed in range(200)])
    assert len(drawn) == 200 * 129
    shares = LABELS[drawn].bincount(minlength=3) / len(drawn)
    np.testing.assert_allclose(shares, class_shares(sampler, COUNTS, 0.5), atol=4 * np.sqrt(0.25 / len(drawn)))
    of_the_last = drawn[LABELS[drawn] == 2].bincount(minlength=129)[-4:]
    mean = float(of_the_last.sum()) / 4
    assert (of_the_last - mean).abs().max() < 5 * mean**0.5


def test_an_order_is_repeated_by_its_seed() -> None:
    assert torch.equal(_order("progressive", 0.3, 5), _order("progressive", 0.3, 5))
    assert not torch.equal(_order("progressive", 0.3, 5), _order("progressive", 0.3, 6))
