import pytest
import torch
from torch import Tensor
from torch.nn import functional

from camcal.training.data.mix import Mix, Mixed
from camcal.training.recipe import AugmentConfig

LABELS = torch.arange(16)
# Image i is i everywhere, so that a mixed pixel tells where it came from.
IMAGES = LABELS.float()[:, None, None, None].expand(16, 8, 8, 3)


def _mix(seed: int, mixup: float = 0.0, cutmix: float = 0.0) -> Mixed:
    return Mix(AugmentConfig(mixup=mixup, cutmix=cutmix), seed)(IMAGES, LABELS)


def test_without_mixing_the_batch_stays_as_it_is() -> None:
    mixed = _mix(0)
    assert mixed.images_BHWC is IMAGES and mixed.labels_B is LABELS and mixed.share == 1


@pytest.mark.parametrize("seed", range(8))
def test_mixup_is_a_weighted_mean_of_the_two_labelled_images(seed: int) -> None:
    mixed = _mix(seed, mixup=1.0)
    expected = mixed.share * mixed.labels_B + (1 - mixed.share) * mixed.partners_B
    torch.testing.assert_close(mixed.images_BHWC, expected[:, None, None, None].expand_as(IMAGES))
    assert 0.5 <= mixed.share <= 1 and mixed.partners_B.sort().values.equal(LABELS)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_shows_the_two_labelled_images_in_their_shares(seed: int) -> None:
    mixed = _mix(seed, cutmix=1.0)
    assert 0.5 <= mixed.share <= 1
    for image, label, partner in zip(mixed.images_BHWC, mixed.labels_B, mixed.partners_B, strict=True):
        assert ((image == label) | (image == partner)).all()
        if label != partner:
            assert (image == label).float().mean().item() == pytest.approx(mixed.share)


def test_cutmix_pastes_one_rectangle_at_the_same_place_in_all_images() -> None:
    sizes = set()
    for seed in range(40):
        mixed = _mix(seed, cutmix=1.0)
        moved = mixed.images_BHWC[..., 0] != IMAGES[..., 0]
        where = moved.any(dim=0)
        rows, columns = where.any(dim=1), where.any(dim=0)
        assert torch.equal(where, rows[:, None] & columns)
        sizes.add(int(where.sum()))
    assert len(sizes) > 8 and max(sizes) > 32


def test_shares_follow_the_beta_distribution() -> None:
    shares = torch.tensor([_mix(seed, mixup=0.2).share for seed in range(600)])
    # Beta(0.2, 0.2) folded at one half: E[max(λ, 1 - λ)] = 0.899, by two million draws elsewhere.
    assert shares.mean() == pytest.approx(0.899, abs=0.02)


def test_with_both_on_each_takes_half_of_the_batches() -> None:
    blended = [bool((m.images_BHWC % 1 != 0).any()) for m in (_mix(s, mixup=1.0, cutmix=1.0) for s in range(200))]
    assert 70 < sum(blended) < 130


def test_the_loss_is_the_mean_of_both_labels_losses_by_share() -> None:
    logits = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    mixed = _mix(3, mixup=1.0)
    soft = mixed.share * functional.one_hot(mixed.labels_B, 16) + (1 - mixed.share) * functional.one_hot(
        mixed.partners_B, 16
    )
    torch.testing.assert_close(mixed.loss(functional.cross_entropy, logits), functional.cross_entropy(logits, soft))


def test_an_unmixed_batch_asks_for_its_loss_once() -> None:
    asked: list[Tensor] = []

    def criterion(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        asked.append(labels_B)
        return functional.cross_entropy(logits_BK, labels_B)

    _mix(0).loss(criterion, torch.zeros(16, 16))
    assert asked == [LABELS]


def test_the_seed_decides_everything() -> None:
    first, again, other = (_mix(seed, mixup=1.0, cutmix=1.0) for seed in (5, 5, 6))
    assert torch.equal(first.images_BHWC, again.images_BHWC) and first.share == again.share
    assert first.share != other.share


@pytest.mark.parametrize(("share", "side"), [(0.36, 80), (0.75, 50), (0.99, 10)])
def test_the_pasted_square_has_the_area_that_is_not_the_first_image_s(share: float, side: int) -> None:
    mix = Mix(AugmentConfig(cutmix=1.0), 0)
    boxes = [mix._box(100, share) for _ in range(300)]
    sides = {(bottom - top, right - left) for top, bottom, left, right in boxes}
    assert max(sides) == (side, side)  # cut off at the border elsewhere
    assert sum(b - t == side and r - left == side for t, b, left, r in boxes) > 0
