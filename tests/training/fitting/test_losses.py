from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from camcal.training.fitting.losses import (
    Criterion,
    branch_members,
    effective_weights,
    grw_weights,
    ldam_margins,
    smoothing,
)
from camcal.training.recipe import LossConfig

Floats = np.ndarray[Any, np.dtype[np.float64]]
COUNTS = np.array([500, 120, 40, 16, 5])
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 0, 4])
LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) * 3
Z = LOGITS.double().numpy()


def _criterion(config: LossConfig, scalar: float = 30.0) -> Criterion:
    return Criterion(config, COUNTS, torch.tensor(scalar))


def _log_p(z: Floats) -> Floats:
    shifted = z - z.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _own(log_p: Floats) -> Floats:
    return np.asarray(log_p[np.arange(len(LABELS)), LABELS.numpy()])


def _expected(config: LossConfig) -> float:
    """The loss of the fixed batch, written out in float64 NumPy."""
    y, pi, z = LABELS.numpy(), COUNTS / 681, Z.copy()
    match config.name:
        case "balanced_softmax":
            p = COUNTS * np.exp(z)
            losses = -np.log((p / p.sum(axis=1, keepdims=True))[np.arange(8), y])
        case "logit_adjustment":
            losses = -_own(_log_p(z + config.tau * np.log(pi)))
        case "ldam":
            z[np.arange(8), y] -= 30 * (config.margin * (COUNTS / 5.0) ** -0.25)[y]
            losses = -_own(_log_p(z))
        case "focal":
            losses = -_own(_log_p(z)) * (1 - np.exp(_own(_log_p(z)))) ** config.gamma
        case _:
            losses = -_own(_log_p(z))
    if config.weights == "none":
        return float(losses.mean())
    if config.weights == "grw":
        w = (1 / pi) ** config.exponent
    else:
        w = np.array([(1 - config.effective_beta) / (1 - config.effective_beta ** float(n)) for n in COUNTS])
    return float(w[y] @ losses / w[y].sum())


CONFIGS = [
    LossConfig(),
    LossConfig(weights="grw"),
    LossConfig(weights="class_balanced", effective_beta=0.99),
    LossConfig(name="focal"),
    LossConfig(name="focal", gamma=0.5, weights="class_balanced"),
    LossConfig(name="ldam"),
    LossConfig(name="ldam", margin=0.3, weights="class_balanced"),
    LossConfig(name="balanced_softmax"),
    LossConfig(name="logit_adjustment", tau=1.5),
]


def _name(config: LossConfig) -> str:
    return f"{config.name}-{config.weights}"


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_losses_against_numpy(config: LossConfig) -> None:
    assert float(_criterion(config)(LOGITS, LABELS)) == pytest.approx(_expected(config), rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_gradients_against_finite_differences(config: LossConfig) -> None:
    criterion = _criterion(config)
    logits = LOGITS.clone().requires_grad_()
    criterion(logits, LABELS).backward()
    assert logits.grad is not None
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(8, 5, generator=generator)
        step = 3e-2 * direction
        slope = (criterion(LOGITS + step, LABELS) - criterion(LOGITS - step, LABELS)) / 6e-2
        assert float((logits.grad * direction).sum()) == pytest.approx(float(slope), rel=0.02, abs=2e-3)


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_plain_cross_entropy_and_smoothing_are_those_of_torch(spread: float) -> None:
    found = _criterion(LossConfig(smoothing=spread))(LOGITS, LABELS)
    torch.testing.assert_close(found, functional.cross_entropy(LOGITS, LABELS, label_smoothing=spread))


def test_grw_weights_by_hand() -> None:
    torch.testing.assert_close(grw_weights(np.array([8, 1]), exponent=1 / 3), torch.tensor([2 / 3, 4 / 3]))
    assert grw_weights(np.array([500, 50, 5]), 1.2).sum() == 3
    assert torch.isfinite(grw_weights(np.array([10, 0]), 1.2)).all()


def test_effective_number_weights_by_hand() -> None:
    # β = 1/2: the effective numbers of 1 and 2 samples are 1 and 3/2, so the weights are as 3 to 2.
    torch.testing.assert_close(effective_weights(np.array([1, 2]), 0.5), torch.tensor([1.2, 0.8]))


def test_ldam_margins_by_hand() -> None:
    torch.testing.assert_close(ldam_margins(np.array([16, 1]), 0.5), torch.tensor([0.25, 0.5]))


def test_label_aware_smoothing_by_hand() -> None:
    counts = np.array([302, 202, 2])
    found = smoothing(LossConfig(smoothing=0.4, smoothing_tail=0.1), counts)
    torch.testing.assert_close(found, torch.tensor([0.4, 0.1 + 0.3 * 0.75**0.5, 0.1]))
    assert smoothing(LossConfig(smoothing=0.4), counts).tolist() == pytest.approx([0.4] * 3)


def test_label_aware_smoothing_against_numpy() -> None:
    config = LossConfig(smoothing=0.4, smoothing_tail=0.1)
    e = smoothing(config, COUNTS).double().numpy()[LABELS.numpy()]
    log_p = _log_p(Z)
    expected = float((-(1 - e) * _own(log_p) - e * log_p.mean(axis=1)).mean())
    assert float(_criterion(config)(LOGITS, LABELS)) == pytest.approx(expected, rel=1e-5)


def test_weights_wait_until_they_are_due() -> None:
    deferred = _criterion(LossConfig(name="ldam", weights="class_balanced", reweight_from=0.8))
    plain, weighted = LossConfig(name="ldam"), LossConfig(name="ldam", weights="class_balanced")
    assert deferred(LOGITS, LABELS, 0.79) == _criterion(plain)(LOGITS, LABELS)
    assert deferred(LOGITS, LABELS, 0.8) == _criterion(weighted)(LOGITS, LABELS)
    assert deferred(LOGITS, LABELS, 0.79) != deferred(LOGITS, LABELS, 0.8)


def test_ldam_margins_grow_with_the_heads_scalar_and_pass_it_their_gradient() -> None:
    scalar = torch.tensor(10.0, requires_grad=True)
    Criterion(LossConfig(name="ldam"), COUNTS, scalar)(LOGITS, LABELS).backward()
    assert scalar.grad is not None
    near = [float(_criterion(LossConfig(name="ldam"), s)(LOGITS, LABELS)) for s in (9.9, 10.1)]
    assert float(scalar.grad) == pytest.approx((near[1] - near[0]) / 0.2, rel=1e-2)


def test_branch_members_by_rank() -> None:
    counts = np.array([5, 90, 90, 1, 300])
    assert branch_members(LossConfig(branch_ranks=(2, 4)), counts).tolist() == [
        [1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
    ]
    default = branch_members(LossConfig(), np.arange(100, 0, -1))
    assert default.sum(dim=1).tolist() == [100, 65, 30] and default[1, 35] == 1 and default[2, 70] == 1
    with pytest.raises(ValueError, match="loss.branch_ranks goes to 9; there are 5 classes"):
        branch_members(LossConfig(branch_ranks=(2, 9)), counts)


@pytest.mark.parametrize("weights", ["none", "grw"])
def test_the_loss_of_branches_against_numpy(weights: str) -> None:
    config = LossConfig.model_validate({"branch_beta": 0.7, "branch_ranks": (1, 3), "weights": weights})
    branches = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(2)) * 2
    z, y = branches.double().numpy(), LABELS.numpy()
    w = (681 / COUNTS)[y] ** 1.2 if weights == "grw" else np.ones(8)
    head, medium, tail = (-_own(_log_p(z[:, b])) * w for b in range(3))
    seen = w.sum() + w[y >= 1].sum() + w[y >= 3].sum()
    apart = (head.sum() + medium[y >= 1].sum() + tail[y >= 3].sum()) / seen
    together = -w @ _own(_log_p(z.sum(axis=1))) / w.sum()
    assert float(_criterion(config)(branches, LABELS)) == pytest.approx(0.7 * apart + 0.3 * together, rel=1e-5)


def test_a_batch_without_rare_classes_has_a_finite_branch_loss() -> None:
    branches = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    loss = _criterion(LossConfig(branch_ranks=(1, 3)))(branches, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert torch.isfinite(loss) and branches.grad is not None and torch.isfinite(branches.grad).all()


def test_a_certain_prediction_has_a_finite_focal_gradient() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    _criterion(LossConfig(name="focal", gamma=0.5))(logits, torch.tensor([0])).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
