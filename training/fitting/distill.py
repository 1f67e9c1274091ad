"""Knowledge distillation (Hinton et al., arXiv 1503.02531). B batch, H, W pixels, K classes."""

from __future__ import annotations

import hashlib
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from camcal.models.classifier import LongTailClassifier
from camcal.models.report import TeacherFacts
from camcal.training.checkpoints import Trained, check_data, load_finished
from camcal.training.fitting.descent import autocast
from camcal.training.fitting.learned_prior import logit_prior
from camcal.training.recipe import Recipe, RecipeError
from camcal.training.run import Run, RunError, RunFolder


class Teacher:
    """Trained networks, before calibration, that another network learns from.

    Teacher and student may have been trained for different class priors, q_T and q (see `logit_prior`). A teacher's
    logits are shifted from one to the other, so that a teacher trained with plain cross-entropy does not pull a student
    with balanced softmax back to the frequent classes. The probabilities of several teachers are averaged.

    Args:
        run: the student's, whose recipe names the teachers.

    Raises:
        RecipeError: if the recipe names no teacher.
        RunError: if a teacher's training is not finished, or was on other images than the student's: it could have
            seen the held-out images.
    """

    def __init__(self, run: Run) -> None:
        recipe, device = run.recipe, run.device
        counts_K = run.data.train.labels.bincount(minlength=len(run.data.classes)).numpy()
        self.networks: list[nn.Module] = []
        self.shifts_K: list[Tensor] = []
        self.facts: list[TeacherFacts] = []
        for folder, (network, taught_by, meta) in load_teachers(recipe):
            check_data(folder, meta, run.data)
            ratio_K = logit_prior(recipe, counts_K) / logit_prior(taught_by, counts_K)
            self.shifts_K.append(torch.from_numpy(ratio_K).log().float().to(device))
            self.networks.append(network.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
            self.facts.append(TeacherFacts(weights=weights_digest(network), recipe=taught_by.shown()))
        self.temperature = recipe.distill.temperature
        self.precision = recipe.fit.precision

    def compile(self) -> None:
        """Compile the networks with constant weights, which more than doubles their speed."""
        for i, network in enumerate(self.networks):
            self.networks[i] = cast(nn.Module, torch.compile(network, dynamic=False, options={"freezing": True}))

    def loss(self, images_BHWC: Tensor, logits_BK: Tensor) -> Tensor:
        """T²·KL(p_T ‖ softmax(z/T)), summed over the batch, of the student's logits z for these images.

        p_T is the mean over the teachers of softmax(z_T/T), with z_T for the same augmented images as the student's.
        """
        t = self.temperature
        with torch.no_grad(), autocast(images_BHWC.device, self.precision):
            log_p = [
                ((network(images_BHWC).float() + shift_K) / t).log_softmax(dim=1)
                for network, shift_K in zip(self.networks, self.shifts_K, strict=True)
            ]
        divergence: Tensor = functional.kl_div(
            (logits_BK.float() / t).log_softmax(dim=1),
            torch.stack(log_p).logsumexp(dim=0) - math.log(len(log_p)),
            reduction="sum",
            log_target=True,
        )
        return t**2 * divergence


def load_teachers(recipe: Recipe) -> list[tuple[RunFolder, Trained]]:
    """The runs that a recipe names as its teachers, and the network of each; raises as `Teacher` does."""
    if recipe.distill.teacher is None:
        raise RecipeError(
            f"distill.weight is {recipe.distill.weight:g}, which needs a teacher: pass --set distill.teacher=RUN, or "
            "train one first with --set distill.set=fit.epochs=400"
        )
    teachers = []
    for path in recipe.distill.teacher:
        folder = RunFolder(path)
        trained = load_finished(folder)
        _check_same_images(folder, trained.recipe, recipe)
        trained.network.views = "one"
        teachers.append((folder, trained))
    return teachers


def weights_digest(network: LongTailClassifier) -> str:
    """Digest of a network's weights, by which results identify teachers: 16 hexadecimal digits."""
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in network.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def _check_same_images(folder: RunFolder, taught_by: Recipe, recipe: Recipe) -> None:
    """Raises RunError unless two recipes agree on images, their size, and which of them are held out."""
    theirs, ours = ({"seed": r.seed} | r.data.model_dump(exclude={"root", "mean", "std"}) for r in (taught_by, recipe))
    for key, value in ours.items():
        if theirs[key] != value:
            name = key if key == "seed" else f"data.{key}"
            raise RunError(
                f"distill.teacher {folder.path} was trained with {name} = {theirs[key]}, this recipe has {value}: it "
                "must be the same, so that both hold out the same images"
            )
