from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from camcal.models import answers
from camcal.models.bundle import INPUTS, OUTPUTS, Bundle, BundleError, write_bundle
from camcal.models.canary import CANARY_FILE, MAX_CANARY_BYTES, MAX_VALUES, canary_count, canary_images


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.load(digits_bundle)


def runner(bundle: Bundle, **changes: NDArray[np.float32] | float) -> answers.RunGraph:
    """Runs the graph; `changes` are added to its outputs."""
    session = onnxruntime.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8], top_k: int) -> answers.Answers:
        found = session.run(list(OUTPUTS), dict(zip(INPUTS, (images, np.array(top_k)), strict=True)))
        return {name: array + changes.get(name, 0) for name, array in zip(OUTPUTS, found, strict=True)}

    return run


def test_export_records_a_canary_that_its_graph_repeats(bundle: Bundle) -> None:
    assert bundle.canary is not None and CANARY_FILE in bundle.manifest.files
    answers.prove(runner(bundle), bundle.manifest, bundle.canary)
    assert answers.record(runner(bundle), bundle.manifest) == bundle.canary


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logits": np.nan}, "logits is not finite"),
        ({"maps": np.inf}, "maps is not finite"),
        ({"top_classes": 10}, "top_classes holds a class that does not exist"),
        ({"top_classes": -10}, "top_classes holds a class that does not exist"),
        ({"maps": 0.01}, "the sum of a map and its logit differ by"),
        ({"probabilities": 0.01}, "the sum of probabilities differ by 0.1; 0.001 is allowed"),
        ({"calibrated_probabilities": -1.0}, "calibrated_probabilities are below zero"),
        ({"calibrated_logits": 0.01}, "calibrated_logits, by the manifest's calibration, differ by"),
    ],
)
@pytest.mark.parametrize("with_canary", [True, False])
def test_wrong_answers(bundle: Bundle, changes: dict[str, float], said: str, with_canary: bool) -> None:
    with pytest.raises(BundleError, match=said):
        answers.prove(runner(bundle, **changes), bundle.manifest, bundle.canary if with_canary else None)


@pytest.mark.parametrize(
    ("name", "rounding", "other"),
    [("logits", 1e-3, 2.0), ("maps", 1e-3, 2.0), ("calibrated_probabilities", 1e-3, 0.1), ("top_classes", 0, 4)],
)
def test_answers_of_another_engine(bundle: Bundle, name: str, rounding: float, other: float) -> None:
    """Rounding is allowed; an answer that is sound in itself, but not the recorded one, is not."""
    assert bundle.canary is not None
    recorded = np.array(getattr(bundle.canary, name))

    def prove(by: float) -> None:
        changed = (recorded + by) % 10 if name == "top_classes" else recorded + by
        canary = bundle.canary.model_copy(update={name: changed.tolist()})  # type: ignore[union-attr]
        answers.prove(runner(bundle), bundle.manifest, canary)

    prove(rounding)
    with pytest.raises(BundleError, match=f"does not answer as it did when the bundle was made: {name} differ by"):
        prove(other)


def test_faults_name_rows(bundle: Bundle) -> None:
    images = canary_images(bundle.manifest.preprocessing.input_size)
    found = {name: array.copy() for name, array in runner(bundle)(images, 2).items()}
    assert answers.faults(found) == {}
    found["maps"][1, 0, 0, 0] = np.inf
    found["top_classes"][2, 1] = 10
    said = {1: "maps is not finite", 2: "top_classes holds a class that does not exist"}
    assert answers.faults(found) == said


def test_images_are_the_same_on_every_machine() -> None:
    images = canary_images(32)
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    assert images.astype(np.int64).sum(axis=(1, 2, 3)).tolist() == SUMS
    assert canary_images(1).shape == (4, 1, 1, 3)
    assert all(image.std() > 30 for image in canary_images(224))


SUMS = [390209, 371712, 418415, 382412]


@pytest.mark.parametrize("classes", [2, 1000, 8142, 65_536])
def test_a_canary_stays_small(classes: int) -> None:
    count = canary_count(classes)
    assert 1 <= count <= 4
    assert count == 1 or count * classes <= MAX_VALUES
    assert classes > 10_000 or 2 * count * classes * len("-1.23456e-10,") < MAX_CANARY_BYTES


def test_canary_of_other_classes_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    assert bundle.canary is not None
    short = bundle.canary.model_copy(update={"logits": [row[:-1] for row in bundle.canary.logits]})
    write_bundle(folder, bundle.manifest, short)
    with pytest.raises(BundleError, match="canary.json does not hold answers of 10 classes with maps of 8×8"):
        Bundle.load(folder)
