from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from camcal.models.headers import Header
from camcal.models.pictures import Picture, read_picture
from camcal.models.preprocessing import Preprocessing
from camcal.training.data import listed
from camcal.training.data.augment import Augment
from camcal.training.data.dataset import DataError
from camcal.training.data.listed import ListedImages, RandomCrop, class_names, load, read_list
from camcal.training.recipe import AugmentConfig, RecipeError, load_recipe

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(fit="crop", resize=40, input_size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def _photograph(path: Path, seed: int, size: tuple[int, int] = (90, 60), exif: Image.Exif | None = None) -> None:
    """A smooth picture, different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(path, quality=95, exif=exif or Image.Exif())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Nine training photographs of three classes (5, 3, 1), and three for the test."""
    lines = []
    for i, label in enumerate([0, 0, 1, 0, 2, 1, 0, 1, 0]):
        _photograph(tmp_path / f"train/kind {label}/{i}.jpg", i)
        lines.append(f"train/kind {label}/{i}.jpg {label}")
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    for label in range(3):
        _photograph(tmp_path / f"val/{label}.jpg", 100 + label)
    (tmp_path / "test.txt").write_text("".join(f"val/{label}.jpg {label}\n" for label in range(3)))
    return tmp_path


def _train(root: Path) -> ListedImages:
    return load(root, "train.txt", "test.txt", PREPROCESSING)[1]


def test_lists_give_classes_named_by_folder_and_labels(root: Path) -> None:
    classes, train, test = load(root, "train.txt", "test.txt", PREPROCESSING)
    assert classes == ["kind 0", "kind 1", "kind 2"]
    assert train.labels.tolist() == [0, 0, 1, 0, 2, 1, 0, 1, 0] and len(test) == 3


def test_batches_hold_what_serving_would_see_in_the_order_asked_for(root: Path) -> None:
    train = _train(root)
    order = [torch.tensor([7, 0, 3, 2]), torch.tensor([8]), *torch.arange(9).split(2)]
    seen = list(train.batches(order, CPU))
    assert [len(labels) for _, labels in seen] == [4, 1, 2, 2, 2, 2, 1]
    for index, (images, labels) in zip(order, seen, strict=True):
        assert images.dtype == torch.uint8 and labels.equal(train.labels[index])
        for i, pixels in zip(index.tolist(), images, strict=True):
            with Image.open(root / train.names[i]) as image:
                assert np.array_equal(pixels.numpy(), PREPROCESSING.apply(image.convert("RGB")))


def test_augmented_batches_are_the_same_for_the_same_seed(root: Path) -> None:
    config = AugmentConfig(area=(0.1, 0.6), aspect=(0.7, 1.4), flip=True)

    def batch(seed: int) -> torch.Tensor:
        augment = Augment(config, torch.Generator().manual_seed(seed))
        ((images, _),) = _train(root).batches([torch.arange(9)], CPU, augment)
        return images

    assert batch(1).shape == (9, 32, 32, 3) and batch(1).dtype == torch.float32
    assert torch.equal(batch(1), batch(1)) and not torch.equal(batch(1), batch(2))


def test_each_pass_draws_other_crops(root: Path) -> None:
    augment = Augment(AugmentConfig(area=(0.1, 0.3)), torch.Generator().manual_seed(0))
    first, second = (next(iter(_train(root).batches([torch.arange(9)], CPU, augment)))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_an_image_drawn_twice_gives_two_crops(root: Path) -> None:
    augment = Augment(AugmentConfig(area=(0.1, 0.3)), torch.Generator().manual_seed(0))
    batches = [images for images, _ in _train(root).batches([torch.tensor([0, 0]), torch.tensor([0])], CPU, augment)]
    crops = torch.cat(batches)
    assert not any(torch.equal(crops[i], crops[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_small_part_can_be_had_as_one_tensor(root: Path) -> None:
    test = load(root, "train.txt", "test.txt", PREPROCESSING)[2]
    assert test.images.shape == (3, 32, 32, 3) and test.images.dtype == torch.uint8


def test_a_subset_keeps_names_and_labels_together(root: Path) -> None:
    part = _train(root).subset(np.array([4, 2]))
    assert part.names == ["train/kind 2/4.jpg", "train/kind 1/2.jpg"] and part.labels.tolist() == [2, 1]


def test_crops_have_the_asked_area_and_aspect_and_lie_inside() -> None:
    crop = RandomCrop(AugmentConfig(area=(0.08, 1.0), aspect=(0.75, 4 / 3)), PREPROCESSING, 0)
    boxes = np.array([crop.box(500, 375, i) for i in range(2000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    shares, aspects = across * down / (500 * 375), across / down
    assert 0.08 <= shares.min() < 0.1 and 0.95 < shares.max() <= 1
    assert 0.75 <= aspects.min() < 0.8 and 1.3 < aspects.max() <= 4 / 3 + 1e-9
    assert crop.box(500, 375, 7) == crop.box(500, 375, 7)


def test_a_crop_that_cannot_fit_becomes_the_part_that_serving_sees() -> None:
    crop = RandomCrop(AugmentConfig(area=(0.9, 1.0), aspect=(10.0, 11.0)), PREPROCESSING, 0)
    assert crop.box(60, 90, 0) == PREPROCESSING.box(60, 90)


def test_decoding_at_reduced_scale_shows_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _photograph(tmp_path / "large.jpg", 0, (1200, 900))
    with Image.open(tmp_path / "large.jpg") as image:
        expected = PREPROCESSING.apply(image.convert("RGB"))
    shrinks: list[int] = []

    def read(data: bytes, header: Header, shrink: int) -> Picture:
        shrinks.append(shrink)
        return read_picture(data, header, shrink)

    monkeypatch.setattr(listed, "read_picture", read)
    pixels = RandomCrop(AugmentConfig(), PREPROCESSING, 0)((tmp_path / "large.jpg").read_bytes(), 0)
    assert shrinks == [8]
    assert np.abs(pixels.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_orientation_tag_is_obeyed_in_crops_too(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    _photograph(tmp_path / "turned.jpg", 0, (64, 64), exif=exif)
    (tmp_path / "list.txt").write_text("turned.jpg 0\n")
    part = load(tmp_path, "list.txt", "list.txt", PREPROCESSING)[1]
    augment = Augment(AugmentConfig(), torch.Generator().manual_seed(0))
    ((plain, _),), ((cropped, _),) = (list(part.batches([torch.tensor([0])], CPU, a)) for a in (None, augment))
    assert (plain.float() - cropped).abs().max() <= 1


def test_an_unreadable_image_is_named_and_the_threads_end(root: Path) -> None:
    (root / "train/kind 1/5.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"5\.jpg cannot be read"):
        list(_train(root).batches(list(torch.arange(9).split(1)), CPU))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg\n", "line 2: expected `relative/path label`, found 'b.jpg'"),
        ("a.jpg -1\n", "line 1: expected"),
        ("\n", "names no image"),
        ("a.jpg 0\n../a.jpg 1\n", r"line 2: '\.\./a\.jpg 1' leaves data.root: paths must stay below it"),
        ("x/../../a.jpg 0\n", "leaves data.root"),
        ("/a.jpg 0\n", "leaves data.root"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_list(tmp_path / "list.txt")


def test_missing_lists_images_and_classes_are_named(root: Path) -> None:
    with pytest.raises(DataError, match="absent.txt cannot be read"):
        load(root, "absent.txt", "test.txt", PREPROCESSING)
    (root / "far.txt").write_text("val/0.jpg 3\n")
    with pytest.raises(DataError, match="has the label 3; train.txt ends at 2"):
        load(root, "train.txt", "far.txt", PREPROCESSING)
    (root / "gone.txt").write_text("val/gone.jpg 0\n")
    with pytest.raises(DataError, match="the first image of gone.txt, is missing: is data.root right"):
        load(root, "train.txt", "gone.txt", PREPROCESSING)


def test_classes_that_share_a_folder_are_named_by_label() -> None:
    labels = np.array([0, 1, 1])
    assert class_names(["a/x.jpg", "b/y.jpg", "b/z.jpg"], labels, 2) == ["a", "b"]
    assert class_names(["a/x.jpg", "a/y.jpg", "b/z.jpg"], labels, 2) == ["0", "1"]


def test_a_list_source_needs_both_lists() -> None:
    with pytest.raises(RecipeError, match="needs data.train_list and data.test_list"):
        load_recipe("digits", ["data.source=list", "data.root=x", "data.train_list=a.txt"])


def test_one_image_under_two_spellings_is_one(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("./x//a.jpg 0\nx/y/../a.jpg 1\n")
    assert read_list(tmp_path / "list.txt")[0] == ["x/a.jpg", "x/a.jpg"]


def test_crops_lie_anywhere() -> None:
    crop = RandomCrop(AugmentConfig(area=(0.2, 0.3)), PREPROCESSING, 0)
    left, top, right, bottom = np.array([crop.box(500, 375, i) for i in range(2000)]).T
    shares = np.stack([left / (500 - (right - left)), top / (375 - (bottom - top))])
    for share in shares:
        # Uniform from 0 to 1: the mean to four standard errors, and the quarters.
        assert share.mean() == pytest.approx(0.5, abs=4 * 0.289 / 2000**0.5)
        assert np.histogram(share, 4, (0, 1))[0].min() > 420
    assert abs(np.corrcoef(shares)[0, 1]) < 0.1
