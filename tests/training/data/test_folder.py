from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from camcal.models.pictures import read_file
from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.decoding import Limits
from camcal.service.engine.decoding import decode as serve
from camcal.training.data import folder, listed
from camcal.training.data.dataset import DataError
from camcal.training.recipe import AugmentConfig
from tests.models.test_colour import display_p3


def _image(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def _paths(samples: folder.Samples) -> list[tuple[str, int]]:
    return [(path.name, label) for path, label in samples]


def test_train_and_test_folders(tmp_path: Path) -> None:
    for part in ("train/cat/b.jpg", "train/cat/a.PNG", "train/dog/deep/c.jpg", "test/dog/d.webp"):
        _image(tmp_path / part)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    listing = folder.list_images(tmp_path)
    assert listing.classes == ["cat", "dog"]
    assert _paths(listing.train) == [("a.PNG", 0), ("b.jpg", 0), ("c.jpg", 1)]
    assert _paths(listing.test) == [("d.webp", 1)]


def test_class_folders_without_a_test_part(tmp_path: Path) -> None:
    for part in ("cat/a.jpg", "dog/b.jpg", ".cache/c.jpg"):
        _image(tmp_path / part)
    (tmp_path / "empty").mkdir()
    listing = folder.list_images(tmp_path)
    assert listing.classes == ["cat", "dog"] and listing.test == []


@pytest.mark.parametrize(
    "parts", [("Train", "Test"), ("training", "testing"), ("TRAIN", "Validation"), ("train", "valid")]
)
def test_parts_go_by_other_names_too(tmp_path: Path, parts: tuple[str, str]) -> None:
    for part in parts:
        for name in ("cat/a.jpg", "dog/b.jfif"):
            (tmp_path / part / name).parent.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / name, "JPEG")
    listing = folder.list_images(tmp_path)
    assert listing.classes == ["cat", "dog"] and len(listing.train) == len(listing.test) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for part in ("bus/a.jpg", "train/b.jpg", "val/c.jpg"):
        _image(tmp_path / part)
    listing = folder.list_images(tmp_path)
    assert listing.classes == ["bus", "train", "val"] and listing.test == []


def test_a_test_part_alone_is_not_taken_for_classes(tmp_path: Path) -> None:
    for part in ("Test/cat/a.jpg", "Val/cat/b.jpg"):
        _image(tmp_path / part)
    with pytest.raises(
        DataError, match="has Test and Val, but none of them is a train folder with one folder per class"
    ):
        folder.list_images(tmp_path)


def test_parts_without_class_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    for part in ("train/cat.1.jpg", "test/1.jpg"):
        _image(tmp_path / part)
    with pytest.raises(
        DataError, match="has test and train, but none of them is a train folder with one folder per class"
    ):
        folder.list_images(tmp_path)


def test_hidden_files_are_no_images_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    for part in ("train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.jpg"):
        _image(tmp_path / part)
    for name in ("train/cat/._a.jpg", "train/__MACOSX/x.jpg", "train/dog/.thumbs/b.jpg", "train/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert folder.list_images(tmp_path).left_out == ""
    for name in ("train/koala/a.heic", "train/koala/b.HEIC", "test/cat/notes", "test/c.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    listing = folder.list_images(tmp_path)
    assert listing.classes == ["cat", "dog"] and len(listing.train) == 2
    assert ".webp were skipped: 2 .heic, 1 " in listing.left_out and "1 no suffix" in listing.left_out
    assert listing.left_out.endswith("; folders without images were skipped: koala")


def test_split_file_with_names(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,split,label\nx/a.jpg,train,dog\nx/b.jpg,test,cat\n")
    listing = folder.list_images(tmp_path, "s.csv")
    assert listing.classes == ["cat", "dog"]
    assert listing.train == [(tmp_path / "x/a.jpg", 1)] and listing.test == [(tmp_path / "x/b.jpg", 0)]


def test_split_file_with_indices_and_a_class_table(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,split,label,extra\na.jpg,train,1,z\nb.jpg,test,zebra,z\n")
    (tmp_path / "classes.csv").write_text("label,name\n0,zebra\n1,ant\n")
    listing = folder.list_images(tmp_path, "s.csv")
    assert listing.classes == ["zebra", "ant"]
    assert _paths(listing.train) == [("a.jpg", 1)] and _paths(listing.test) == [("b.jpg", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.jpg,0", "has no column 'split'; it needs label, path, split"),
        ("path,split,label\na.jpg,validation,0", "line 2: split is 'validation'; expected train or test"),
        ("path,split,label\na.jpg,train,7", "line 2: label '7' is not in classes.csv"),
        ("path,split,label\na.jpg,train,0\nb.jpg,train", "line 3: no label; it needs label, path, split"),
        ("path,split,label\na.jpg,test,0", "s.csv has no row of the split train"),
        ("path,split,label\n", "s.csv has no row of the split train"),
    ],
)
def test_a_wrong_split_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    (tmp_path / "classes.csv").write_text("label,name\n0,zebra\n")
    with pytest.raises(DataError, match=message):
        folder.list_images(tmp_path, "s.csv")


@pytest.mark.parametrize("place", ["../a.jpg", "x/../../a.jpg", "/a.jpg"])
def test_a_path_outside_of_the_data_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "s.csv").write_text(f"path,split,label\n{place},train,cat\n")
    with pytest.raises(DataError, match=f"line 2: '{place}' is outside of .*: paths must stay below it"):
        folder.list_images(tmp_path, "s.csv")


def test_a_label_that_means_two_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,split,label\na.jpg,train,1\n")
    (tmp_path / "classes.csv").write_text("label,name\n0,0\n1,2\n2,1\n")
    with pytest.raises(DataError, match="classes.csv: '2' is the label of one class and the name of another"):
        folder.list_images(tmp_path, "s.csv")


def test_a_test_part_beside_classes_is_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "dog/b.jpg", "Test/cat/c.jpg", "Test/dog/d.jpg"):
        _image(tmp_path / name)
    with pytest.raises(DataError, match="has class folders beside Test, .* names: move the former into .*train"):
        folder.list_images(tmp_path)


def test_a_class_table_with_a_short_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,split,label\na.jpg,train,0\n")
    (tmp_path / "classes.csv").write_text("label,name\n0\n")
    with pytest.raises(DataError, match="classes.csv, line 2: no name; it needs label, name"):
        folder.list_images(tmp_path, "s.csv")


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder at .*nowhere"):
        folder.list_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has 0 folders with images; expected one per class, for two classes or more"):
        folder.list_images(tmp_path)
    with pytest.raises(DataError, match="s.csv cannot be read"):
        folder.list_images(tmp_path, "s.csv")


def test_a_class_that_only_the_test_part_has(tmp_path: Path) -> None:
    for part in ("train/cat/a.jpg", "train/dog/b.jpg", "test/cow/c.jpg"):
        _image(tmp_path / part)
    with pytest.raises(DataError, match="has the class 'cow', which .*train does not have"):
        folder.list_images(tmp_path)


RULE = Preprocessing(fit="crop", resize=16, input_size=16, mean=(0, 0, 0), std=(1, 1, 1))


def test_decoding_gives_rgb_of_the_input_size(tmp_path: Path) -> None:
    _image(tmp_path / "a.png", (200, 100, 50))
    Image.new("L", (20, 60), 77).save(tmp_path / "b.png")
    images, labels = folder.decode([(tmp_path / "a.png", 3), (tmp_path / "b.png", 1)], RULE)
    assert images.shape == (2, 16, 16, 3) and labels.tolist() == [3, 1]
    assert np.unique(images[0].reshape(-1, 3), axis=0).tolist() == [[200, 100, 50]]
    assert (images[1] == 77).all()


def test_the_orientation_tag_is_obeyed(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    images, _ = folder.decode([(tmp_path / "turned.png", 0)], RULE)
    assert images[0, 2].max() == 0 and images[0, 13].min() == 255


def test_unreadable_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    _image(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
    samples = [(tmp_path / name, 0) for name in ("good.png", "bad.jpg", "gone.jpg")]
    with pytest.raises(DataError, match="2 of 3 images cannot be read; the first: .*bad.jpg"):
        folder.decode(samples, RULE)


@pytest.mark.parametrize("fit", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "turned", "profile"])
def test_training_sees_what_serving_sees(
    tmp_path: Path, mode: str, fit: Literal["crop", "stretch", "letterbox"]
) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "turned") else "image.png")
    if mode == "I;16":
        Image.fromarray(random.integers(0, 65536, (30, 40), dtype=np.uint16)).save(path)
    elif mode == "P":
        indices = Image.fromarray(random.integers(0, 8, (30, 40), dtype=np.uint8), "P")
        indices.putpalette(random.integers(0, 256, 24, dtype=np.uint8).tobytes())
        indices.save(path, transparency=3)
    elif mode == "profile":
        colours = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        colours.save(path, icc_profile=display_p3())
    elif mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path, exif=exif)
    else:
        rgba = Image.fromarray(random.integers(0, 256, (30, 40, 4), dtype=np.uint8), "RGBA")
        rgba.convert(mode).save(path)
    rule = Preprocessing(fit=fit, resize=24, input_size=24, mean=(0.5, 0.4, 0.2), std=(1, 1, 1))
    served = serve(path.read_bytes(), rule, Limits(max_bytes=10**6, max_pixels=10**6), picture=False).pixels
    (trained,), _ = folder.decode([(path, 0)], rule)
    np.testing.assert_array_equal(trained, served)
    part = listed.ListedImages(root=tmp_path, names=[path.name], labels=torch.tensor([0]), preprocessing=rule)
    np.testing.assert_array_equal(part.images[0], served)
    whole = AugmentConfig(area=(1.0, 1.0), aspect=(1.0, 1.0))
    cropped = listed.RandomCrop(whole, rule, 0)(path.read_bytes(), 0)
    np.testing.assert_array_equal(cropped, served)
    if fit == "letterbox":
        sides = (slice(None), slice(0, 3)) if mode == "turned" else (slice(0, 3), slice(None))
        assert (served[sides] == (128, 102, 51)).all()


def test_a_damaged_chunk_is_an_unreadable_image(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[37:41] = b"\xff\xff\xff\xff"  # the type of the chunk behind the header
    (tmp_path / "a.png").write_bytes(data)
    rule = Preprocessing(fit="stretch", resize=8, input_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(DataError, match=r"1 of 1 images cannot be read; the first: .*a\.png"):
        folder.decode([(tmp_path / "a.png", 0)], rule)


def test_a_table_saved_by_excel_is_read(tmp_path: Path) -> None:
    text = "path,split,label\nx/a.jpg,train,dog\nx/b.jpg,test,cat\n"
    (tmp_path / "s.csv").write_text(text, encoding="utf-8-sig")
    assert folder.list_images(tmp_path, "s.csv").classes == ["cat", "dog"]
    (tmp_path / "l.txt").write_text("x/a.jpg 0\n", encoding="utf-8-sig")
    assert listed.read_list(tmp_path / "l.txt")[0] == ["x/a.jpg"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_is_turned_once(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path, exif=exif)
    rule = Preprocessing(fit="stretch", resize=16, input_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    assert read_file(path).rgb.size == (20, 30)
    with Image.open(path) as image:
        expected = rule.apply(ImageOps.exif_transpose(image).convert("RGB"))
    (found,), _ = folder.decode([(path, 0)], rule)
    np.testing.assert_array_equal(found, expected)
    crop = listed.RandomCrop(AugmentConfig(area=(1.0, 1.0), aspect=(1.0, 1.0)), rule, 0)
    cropped = crop(path.read_bytes(), 0)
    assert np.abs(cropped.astype(int) - expected).max() <= 1
