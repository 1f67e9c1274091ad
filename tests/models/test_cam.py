import pytest
import torch

from camcal.models import cam
from camcal.models.marc import MARC
from camcal.models.normalized import HEADS, build_head


def test_contributions_by_hand() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])
    maps = cam.contributions(features, torch.tensor([[[2.0, -1.0]]]), torch.tensor([[4.0]]))
    assert maps.tolist() == [[[[(2 - 3 + 4) / 2, (4 - 5 + 4) / 2]]]]


def test_calibrated_contributions_by_hand() -> None:
    # β·‖W‖ = 1.5·4 is shared by both positions of the second class, ω = 3 scales each; the first class stays.
    maps = torch.tensor([[[[1.0, 2.0]], [[-1.0, 5.0]]]])
    one, two = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.5])
    assert cam.calibrated(maps, one, two, torch.tensor([9.0, 4.0])).tolist() == [[[[1, 2]], [[-3 + 3, 15 + 3]]]]


@pytest.mark.parametrize("name", HEADS)
def test_maps_sum_to_logits_and_calibrated_maps_to_calibrated_logits(name: str) -> None:
    torch.manual_seed(0)
    head, features, marc = build_head(name, 16, 5, 16.0, True), torch.randn(3, 16, 7, 6), MARC(5)
    with torch.no_grad():
        marc.omega.uniform_(0.5, 2)
        marc.beta.uniform_(-1, 1)
        pooled = features.mean(dim=(2, 3))
        rows = head.effective_weight().expand(3, -1, -1)
        explained = head.gain(pooled)[..., None, None] * features
        maps = cam.contributions(explained, rows, head.effective_bias().expand(3, -1))
        calibrated = cam.calibrated(maps, marc.omega, marc.beta, head.weight_norms())
        logits = head(pooled)
        torch.testing.assert_close(maps.sum(dim=(2, 3)), logits, rtol=1e-4, atol=1e-5)
        expected = marc(logits, head.weight_norms())
        torch.testing.assert_close(calibrated.sum(dim=(2, 3)), expected, rtol=1e-4, atol=1e-5)
