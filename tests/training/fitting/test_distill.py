"""Knowledge distillation: the loss by hand, and what may be a teacher."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from camcal.models.report import TeacherFacts
from camcal.training import pipeline
from camcal.training.checkpoints import build_network, load_network, load_tensors, save_tensors
from camcal.training.data import Dataset, load_dataset
from camcal.training.fitting.distill import Teacher
from camcal.training.fitting.training import Training
from camcal.training.metrics import softmax
from camcal.training.recipe import RecipeError, load_recipe
from camcal.training.report import page as report_module
from camcal.training.run import RunError, RunFolder
from tests.training.fitting.test_fit import interrupt
from tests.training.runs import make_run

CPU = torch.device("cpu")
NOWHERE = Path("nowhere")
QUICK = ["fit.epochs=2", "fit.warmup_epochs=1", "fit.precision=fp32", "calibrate.iterations=50", "calibrate.passes=1"]


def _quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def data() -> Dataset:
    recipe = load_recipe("digits")
    return load_dataset(recipe.data, recipe.seed)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of plain cross-entropy."""
    run = RunFolder(tmp_path_factory.mktemp("teacher"))
    pipeline.train(load_recipe("digits", QUICK), run, _quiet())
    return run


def _student(taught: RunFolder, *overrides: str) -> list[str]:
    return [*QUICK, f"distill.teacher={taught.path}", "distill.weight=0.5", *overrides]


def test_the_loss_is_the_divergence_from_the_teacher_s_probabilities_for_the_students_prior(
    taught: RunFolder, data: Dataset
) -> None:
    recipe = load_recipe("digits", _student(taught, "loss.name=balanced_softmax", "distill.temperature=2"))
    teacher = Teacher(make_run(recipe, NOWHERE, data))
    images_BHWC, _ = next(iter(data.test.batches([torch.arange(7)], CPU)))
    z_BK = 5 * torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    network = load_network(taught.checkpoint)[0]
    with torch.no_grad():
        said_BK = network(images_BHWC).double().numpy()
    # Plain cross-entropy's logits are for the training frequencies, balanced softmax's for an even prior.
    counts_K = data.train.labels.bincount(minlength=10).numpy()
    p_BK = softmax((said_BK - np.log(counts_K / counts_K.sum())) / 2)
    q_BK = softmax(z_BK.double().numpy() / 2)
    wanted = 4 * (p_BK * np.log(p_BK / q_BK)).sum()
    assert float(teacher.loss(images_BHWC, z_BK)) == pytest.approx(wanted, rel=1e-5)


def test_of_two_teachers_the_mean_of_the_probabilities_is_heard(
    taught: RunFolder, data: Dataset, tmp_path: Path
) -> None:
    other = RunFolder(tmp_path)
    pipeline.fit_run(make_run(load_recipe("digits", [*QUICK, "loss.name=balanced_softmax"]), other, data))
    both = f'distill.teacher=["{taught.path}", "{other.path}"]'
    recipe = load_recipe("digits", [*QUICK, both, "distill.weight=0.5", "distill.temperature=2"])
    teacher = Teacher(make_run(recipe, NOWHERE, data))
    images_BHWC, _ = next(iter(data.test.batches([torch.arange(7)], CPU)))
    z_BK = 5 * torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain_BK, even_BK = (load_network(r.checkpoint)[0](images_BHWC).double().numpy() for r in (taught, other))
    # The student's logits are for the training frequencies, and so are those of the first teacher.
    counts_K = data.train.labels.bincount(minlength=10).numpy()
    p_BK = (softmax(plain_BK / 2) + softmax((even_BK + np.log(counts_K / counts_K.sum())) / 2)) / 2
    q_BK = softmax(z_BK.double().numpy() / 2)
    wanted = 4 * (p_BK * np.log(p_BK / q_BK)).sum()
    assert float(teacher.loss(images_BHWC, z_BK)) == pytest.approx(wanted, rel=1e-5)


def test_labels_and_teacher_share_the_loss_by_weight(taught: RunFolder, data: Dataset) -> None:
    alone = ["augment.shift=0", "fit.batch_size=1000", "distill.weight=0.3", "distill.temperature=2"]
    recipe = load_recipe("digits", _student(taught, *alone))
    network = build_network(recipe, 10, data.preprocessing).train()
    every = torch.arange(len(data.train))
    images_BHWC, labels_B = next(iter(data.train.batches([every], CPU)))
    with torch.no_grad():
        z_BK = copy.deepcopy(network)(images_BHWC, labels_B).double().numpy()
        said_BK = load_network(taught.checkpoint)[0](images_BHWC).double().numpy()
    label = -np.log(softmax(z_BK)[every, labels_B]).mean()
    p_BK, q_BK = softmax(said_BK / 2), softmax(z_BK / 2)
    taught_loss = 4 * (p_BK * np.log(p_BK / q_BK)).sum(axis=1).mean()
    run = make_run(recipe, NOWHERE, data)
    (loss, _, size), *rest = Training(run, network, Teacher(run)).epoch(0)
    assert size == len(data.train) and not rest
    assert float(loss) / size == pytest.approx(0.7 * label + 0.3 * taught_loss, rel=1e-4)


def test_who_says_what_the_teacher_says_has_nothing_to_learn(taught: RunFolder, data: Dataset) -> None:
    recipe = load_recipe("digits", _student(taught))
    teacher = Teacher(make_run(recipe, NOWHERE, data))
    images_BHWC, _ = next(iter(data.test.batches([torch.arange(7)], CPU)))
    with torch.no_grad():
        said_BK = load_network(taught.checkpoint)[0](images_BHWC)
    z_BK = said_BK.clone().requires_grad_()
    loss = teacher.loss(images_BHWC, z_BK)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert z_BK.grad is not None and float(z_BK.grad.abs().max()) < 1e-5
    assert all(parameter.grad is None for network in teacher.networks for parameter in network.parameters())


def test_a_student_that_only_listens_comes_nearer_to_its_teacher(
    taught: RunFolder, data: Dataset, tmp_path: Path
) -> None:
    images_BHWC, _ = next(iter(data.train.batches([torch.arange(len(data.train))], CPU)))

    def distance(run: RunFolder) -> float:
        recipe = load_recipe("digits", _student(taught))
        with torch.no_grad():
            z_BK = load_network(run.checkpoint)[0](images_BHWC)
        return float(Teacher(make_run(recipe, NOWHERE, data)).loss(images_BHWC, z_BK)) / len(z_BK)

    found = {}
    for weight in (1.0, 0.0):
        listening = [f"distill.teacher={taught.path}", f"distill.weight={weight}"] if weight else []
        recipe = load_recipe("digits", [*QUICK, "fit.epochs=6", *listening])
        run = RunFolder(tmp_path / str(weight))
        pipeline.fit_run(make_run(recipe, run, data))
        found[weight] = distance(run)
    assert found[1.0] < 0.5 * found[0.0]


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs a C++ compiler")
def test_a_compiled_teacher_says_the_same(taught: RunFolder, data: Dataset) -> None:
    teacher = Teacher(make_run(load_recipe("digits", _student(taught)), NOWHERE, data))
    images_BHWC, _ = next(iter(data.test.batches([torch.arange(7)], CPU)))
    z_BK = torch.zeros(7, 10)
    plain = teacher.loss(images_BHWC, z_BK)
    teacher.compile()
    torch.testing.assert_close(teacher.loss(images_BHWC, z_BK), plain, rtol=1e-4, atol=1e-4)


class _Counting(nn.Module):
    """A network that remembers whether it was asked with gradients and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, images_BHWC: Tensor) -> Tensor:
        self.seen.append((torch.is_grad_enabled(), self.training))
        return torch.zeros(len(images_BHWC), 10)


def test_the_teacher_is_asked_once_for_each_batch_in_evaluation_mode(
    taught: RunFolder, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = _Counting().eval()
    made = Teacher.__init__

    def watched(self: Teacher, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]  # the arguments are those of the real one
        self.networks = [network]

    monkeypatch.setattr(Teacher, "__init__", watched)
    recipe = load_recipe("digits", _student(taught, "model.reslt=cifar", "model.head=linear", "augment.mixup=1"))
    pipeline.fit_run(make_run(recipe, RunFolder(tmp_path), data))
    batches = -(-len(data.train) // recipe.fit.batch_size)
    assert network.seen == [(False, False)] * 2 * batches


def test_a_distilled_run_says_who_taught_it(taught: RunFolder, tmp_path: Path) -> None:
    recipe = load_recipe("digits", _student(taught, "calibrate.refit=true", "model.backbone=resnet20"))
    run = RunFolder(tmp_path / "run")
    pipeline.train(recipe, run, _quiet())
    report = json.loads(run.report.read_text())
    assert report["teachers"][0]["recipe"]["model"]["backbone"] == "resnet8"
    assert "resnet8, 2 epochs of recipe digits, cross_entropy; weights" in run.page.read_text()
    metas = [load_tensors(each.checkpoint)[1] for each in (run, run.refit)]
    assert metas[0]["teachers"] == metas[1]["teachers"] == report["teachers"]
    # Neither report nor bundle holds the place where the teacher lay, and both can be read without it.
    assert "teacher" not in report["settings"]["distill"]
    assert str(taught.path) not in (run.bundle / "manifest.json").read_text()
    with pytest.raises(RecipeError, match=r"distill.weight is 0.5, which needs a teacher: pass --set distill.teacher="):
        again = load_recipe(_saved(tmp_path / "again.json", report["settings"]))
        pipeline.train(again, RunFolder(tmp_path / "again"), _quiet())


def _saved(path: Path, settings: object) -> Path:
    path.write_text(json.dumps({"recipe": settings}))
    return path


def test_the_report_names_each_of_several_teachers(taught: RunFolder) -> None:
    one = load_tensors(taught.checkpoint)[1]["recipe"]
    teachers = [TeacherFacts(weights=weights, recipe=one) for weights in ("aa", "bb")]
    said = report_module._teachers(teachers)
    assert list(said) == ["teacher 1", "teacher 2"] and said["teacher 2"].endswith("weights bb")
    assert list(report_module._teachers(teachers[:1])) == ["teacher"]


def test_a_student_starts_elsewhere_than_its_teacher(taught: RunFolder) -> None:
    teacher, student = (build_network(load_recipe("digits", o), 10) for o in (QUICK, _student(taught)))
    assert not torch.equal(teacher.head.weight, student.head.weight)


def test_going_on_with_another_teacher_is_refused(taught: RunFolder, data: Dataset, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    pipeline.fit_run(make_run(load_recipe("digits", [*QUICK, "fit.lr=0.05"]), other, data))
    run = RunFolder(tmp_path / "run")
    pipeline.fit_run(make_run(load_recipe("digits", _student(taught)), run, data))
    with pytest.raises(RunError, match="holds a run with another teacher: choose another --out"):
        pipeline.fit_run(make_run(load_recipe("digits", _student(other)), run, data))
    with pytest.raises(RunError, match="another distill.temperature"):
        recipe = load_recipe("digits", _student(taught, "distill.temperature=4"))
        pipeline.fit_run(make_run(recipe, run, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "was trained with seed = 0, this recipe has 1: it must be the same"),
        ("data.holdout_fraction=0.2", "was trained with data.holdout_fraction = 0.15, this recipe has 0.2"),
        ("data.imbalance=20", r"was trained with data.imbalance = .*, this recipe has 20"),
        ("data.mean=[0.4,0.4,0.4]", ""),
        ("distill.teacher=nowhere", "checkpoint.safetensors is missing"),
    ],
)
def test_a_teacher_has_seen_the_very_images_of_its_student(
    taught: RunFolder, data: Dataset, change: str, message: str
) -> None:
    recipe = load_recipe("digits", _student(taught, change))
    if not message:
        Teacher(make_run(recipe, NOWHERE, data))
        return
    with pytest.raises(RunError, match=message):
        Teacher(make_run(recipe, NOWHERE, data))


def test_a_teacher_of_images_that_have_changed_since_is_refused(taught: RunFolder, data: Dataset) -> None:
    fewer = dataclasses.replace(data, train=data.train.subset(np.arange(len(data.train) - 1)))
    with pytest.raises(RunError, match="was trained on other images than the data has now"):
        Teacher(make_run(load_recipe("digits", _student(taught)), NOWHERE, fewer))


def test_an_unfinished_teacher_is_refused(taught: RunFolder, data: Dataset, tmp_path: Path) -> None:
    half = RunFolder(tmp_path)
    recipe = load_recipe("digits", [*QUICK, "fit.epochs=3"])
    tensors, meta = load_tensors(taught.checkpoint)
    save_tensors(half.checkpoint, tensors, meta | {"recipe": recipe.model_dump(mode="json")})
    with pytest.raises(RunError, match="has 2 of 3 epochs: finish it with `camcal train` first"):
        Teacher(make_run(load_recipe("digits", _student(half)), NOWHERE, data))


@pytest.mark.parametrize("teacher", ["distill.teacher=somewhere", "distill.set=fit.epochs=3"])
def test_a_teacher_that_is_not_listened_to_is_refused(teacher: str) -> None:
    with pytest.raises(RecipeError, match="'distill': a teacher needs distill.weight above 0"):
        load_recipe("digits", [teacher])


def test_a_teacher_that_is_trained_first_is_the_one_that_was_trained_apart(data: Dataset, tmp_path: Path) -> None:
    apart, taught, whole = (RunFolder(tmp_path / name) for name in ("apart", "taught", "whole"))
    pipeline.fit_run(make_run(load_recipe("digits", [*QUICK, "fit.epochs=3", "fit.lr=0.05"]), apart, data))
    pipeline.fit_run(make_run(load_recipe("digits", _student(apart)), taught, data))
    first = ["distill.weight=0.5", 'distill.set=["fit.epochs=3", "fit.lr=0.05"]']
    recipe = load_recipe("digits", [*QUICK, *first])
    pipeline.fit_run(make_run(recipe, whole, data))
    for one, other in ((apart, whole.teachers()[0]), (taught, whole)):
        (tensors, meta), (others, other_meta) = (load_tensors(run.checkpoint) for run in (one, other))
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
        assert [t["weights"] for t in meta.get("teachers", [])] == [
            t["weights"] for t in other_meta.get("teachers", [])
        ]
    # A run that is finished needs its teacher no more.
    shutil.rmtree(whole.teachers()[0].path)
    pipeline.fit_run(make_run(recipe, whole, data))
    assert not whole.teachers()[0].path.exists()


def test_several_teachers_are_trained_first_each_in_a_folder_of_its_own(data: Dataset, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    recipe = load_recipe("digits", [*QUICK, "distill.weight=0.5", 'distill.set=["fit.lr=0.05", ["fit.epochs=3"]]'])
    console = _quiet()
    pipeline.fit_run(make_run(recipe, run, data, console))
    metas = [load_tensors(each.checkpoint)[1] for each in run.teachers(2)]
    assert [(m["epoch"], m["recipe"]["fit"]["lr"]) for m in metas] == [(2, 0.05), (3, recipe.fit.lr)]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "training teacher 1 of 2 first: resnet8, 2 epochs" in said and "teacher 2 of 2 first" in said
    taught = load_tensors(run.checkpoint)[1]["teachers"]
    assert [teacher["recipe"]["fit"]["epochs"] for teacher in taught] == [2, 3]
    other = RunFolder(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    with pytest.raises(RunError, match="holds a run with another teacher"):
        first = f'distill.teacher=["{run.teachers(2)[1].path}", "{run.teachers(2)[0].path}"]'
        swapped = load_recipe("digits", [*QUICK, "distill.weight=0.5", first])
        tensors, meta = load_tensors(other.checkpoint)
        save_tensors(other.checkpoint, tensors, meta | {"recipe": swapped.model_dump(mode="json")})
        pipeline.fit_run(make_run(swapped, other, data))


@pytest.mark.parametrize("stop", [2, 4], ids=["teacher", "student"])
def test_a_run_that_stops_in_either_training_goes_on_there(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    recipe = load_recipe("digits", [*QUICK, "distill.weight=0.5", "distill.set=fit.epochs=2"])
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    pipeline.fit_run(make_run(recipe, whole, data))
    epochs = interrupt(monkeypatch, at=stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.fit_run(make_run(recipe, parts, data))
    pipeline.fit_run(make_run(recipe, parts, data))
    assert len(epochs) == 5  # two epochs of each, and one that was broken off
    for one, other in ((whole.teachers()[0], parts.teachers()[0]), (whole, parts)):
        tensors, others = load_tensors(one.checkpoint)[0], load_tensors(other.checkpoint)[0]
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_what_is_wrong_is_said_before_a_teacher_is_trained(taught: RunFolder, data: Dataset, tmp_path: Path) -> None:
    distilled = [*QUICK, "distill.weight=0.5", "distill.set=model.reslt=off"]
    shutil.copytree(taught.path, tmp_path / "taken")
    with pytest.raises(RunError, match="holds a run with another distill.set, distill.weight: choose another --out"):
        pipeline.fit_run(make_run(load_recipe("digits", distilled), RunFolder(tmp_path / "taken"), data))
    ranks = load_recipe("digits", [*distilled, "model.reslt=cifar", "model.head=linear", "loss.branch_ranks=[3,11]"])
    with pytest.raises(ValueError, match="loss.branch_ranks goes to 11; there are 10 classes"):
        pipeline.fit_run(make_run(ranks, RunFolder(tmp_path / "new"), data))
    assert not list(tmp_path.glob("*/teacher"))
    # Another teacher that was trained there is not taken for this one.
    other = load_recipe("digits", [*QUICK, "fit.lr=0.05"])
    pipeline.fit_run(make_run(other, RunFolder(tmp_path / "new" / "teacher"), data))
    with pytest.raises(RunError, match="teacher holds a run with another fit.lr"):
        pipeline.fit_run(make_run(load_recipe("digits", distilled), RunFolder(tmp_path / "new"), data))


def test_a_teacher_differs_from_its_student_by_what_the_recipe_says() -> None:
    student = ["distill.weight=0.5", "distill.temperature=2", "model.head=linear", "calibrate.rescale=tau", "seed=3"]
    recipe = load_recipe("digits", [*student, "distill.set=model.head=cosine"])
    plain = load_recipe("digits", ["model.head=cosine", "seed=3"])
    assert recipe.teaching() == [plain]
    same = load_recipe("digits", [student[2], "seed=3"])
    assert load_recipe("digits", [*student, "distill.set=[]"]).teaching() == [same]
    assert load_recipe("digits", [*student, "distill.set=none"]).teaching() == []
    several = load_recipe("digits", [*student, 'distill.set=[["model.head=cosine"], []]'])
    assert several.teaching() == [plain, same]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('["fit.epoch=3"]', "distill.set: unknown key 'fit.epoch'; did you mean 'epochs'"),
        ("loss.name=ldam", "distill.set: loss.name = 'ldam' needs a normalised head"),
        ("seed=1", "distill.set: 'seed=1' is not section.key=value with a key of augment, model, loss or fit"),
        ("data.imbalance=3", "distill.set: 'data.imbalance=3' is not section.key=value with a key of augment"),
        ("fit.epochs", "distill.set: 'fit.epochs' is not section.key=value"),
        ("[fit.epochs=3]", r"several are a list, \["),
        ("4", "'distill.set': expected section.key=value, a list of those for one teacher, or a list of such lists"),
        ('["fit.lr=0.1", ["fit.lr=0.2"], 3]', "a list of such lists"),
        ('["fit.lr=0.1", ["fit.lr=0.1"]]', "distill.set: teacher 2 is the same as one before it"),
        ('[["fit.lr=0.1"], ["fit.epoch=3"]]', "distill.set: unknown key 'fit.epoch'; did you mean 'epochs'"),
    ],
)
def test_a_teacher_that_could_not_teach_is_refused(changes: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", ["model.head=linear", "distill.weight=0.5", f"distill.set={changes}"])


def test_two_teachers_are_refused() -> None:
    with pytest.raises(RecipeError, match="exclude each other: choose one; distill.set=none unsets it"):
        load_recipe("digits", ["distill.weight=0.5", "distill.set=[]", "distill.teacher=somewhere"])
