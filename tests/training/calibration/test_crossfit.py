import math

import numpy as np
import pytest
import torch

from camcal.training.calibration import crossfit


def test_folds_hold_each_sample_once_and_are_equal_for_each_class() -> None:
    labels = torch.tensor([0] * 12 + [1] * 7 + [2] + [3])[
        torch.randperm(21, generator=torch.Generator().manual_seed(0))
    ]
    parts = crossfit.folds(labels)
    assert sorted(torch.cat(parts).tolist()) == list(range(21)) and len(parts) == 5
    assert {len(part) for part in parts} == {4, 5}
    counts = torch.stack([labels[part].bincount(minlength=4) for part in parts])
    assert (counts.amax(dim=0) - counts.amin(dim=0) <= 1).all()
    others = crossfit.rest(parts, 2)
    assert sorted([*others.tolist(), *parts[2].tolist()]) == list(range(21))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_samples_than_folds_are_a_fold_each(count: int) -> None:
    parts = crossfit.folds(torch.arange(count))
    assert [len(part) for part in parts] == [1] * count


def test_losses_are_negative_log_likelihoods() -> None:
    found = crossfit.losses(torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([1, 0]))
    np.testing.assert_allclose(found, [math.log(4 / 3), math.log(2)])
    found = crossfit.losses(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]), 0.2)
    np.testing.assert_allclose(found, [0.8 * math.log(4 / 3) + 0.2 * (math.log(4) + math.log(4 / 3)) / 2])


def test_the_doubt_is_the_share_of_one_sample_more() -> None:
    assert crossfit.doubt(np.full(9, 0.3)) == pytest.approx(0.1)
    assert crossfit.doubt(np.array([1.0, 1.0, 0.0])) == pytest.approx(1 / 3) and crossfit.doubt(np.ones(0)) == 0


def test_the_error_of_a_difference_is_that_of_repeated_samples() -> None:
    random = np.random.default_rng(0)
    weights = random.choice([0.2, 1.0, 5.0], 400)
    means, errors = [], []
    for _ in range(300):
        ones, others = random.normal(1.0, 1.0, 400), random.normal(0.7, 0.5, 400)
        mean, error = crossfit.difference(ones, others, weights)
        means.append(mean)
        errors.append(error)
    assert np.mean(means) == pytest.approx(0.3, abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert crossfit.difference(np.ones(1), np.zeros(1), np.ones(1)) == (1, math.inf)


def test_of_those_within_an_error_of_the_best_the_simplest_is_taken() -> None:
    random = np.random.default_rng(0)
    best = random.exponential(size=400)
    close, far = best + random.normal(0.001, 0.1, 400), best + random.normal(0.1, 0.1, 400)
    even = np.ones(400)
    assert crossfit.simplest([far, close, best], [1, 2, 21], even) == 1
    assert crossfit.simplest([best, close, far], [21, 2, 1], even) == 1
    assert crossfit.simplest([far, far + 1, best], [1, 2, 21], even) == 2
    assert crossfit.simplest([best, close], [1, 2], even) == 0
    # Weights decide which samples count.
    first = np.where(np.arange(400) < 200, 1.0, 0.0)
    split = best + np.where(np.arange(400) < 200, 1e-3 * (-1.0) ** np.arange(400), 0.5)
    assert crossfit.simplest([split, best], [1, 2], first) == 0 and crossfit.simplest([split, best], [1, 2], even) == 1


def test_a_penalty_is_chosen_for_each_part_by_all_others() -> None:
    """Under one penalty the first part would look best, under the other all parts but that."""
    labels = torch.zeros(20, dtype=torch.long)
    parts = crossfit.folds(labels, 4)
    first = torch.zeros(20, dtype=torch.bool)
    first[parts[0]] = True
    unseen = {1.0: torch.where(first, 100.0, 0.0)[:, None], 2.0: torch.where(first, 0.0, 1.0)[:, None]}

    penalty, found = crossfit.choose_penalty(unseen, parts, lambda logits: -logits[:, 0].double().numpy(), np.ones(20))
    assert penalty == 1  # over all, 500 against 15
    assert (found[first] == 0).all()  # by the others, which know nothing of 100
    assert (found[~first] == 0).all()
