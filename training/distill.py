"""Knowledge distillation (Hinton et al., arXiv 1503.02531). B batch, H, W pixels, K classes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.classifier import LongTailClassifier
from training.config import Recipe, RecipeError
from training.data import Dataset
from training.priors import logit_prior
from training.run import Run, RunError, check_data, load_finished


class Teacher:
    """A trained network, as it was before calibration, that another network learns from.

    Each of the two may have been trained for a class prior of its own, q_T and q (`training.priors.logit_prior`). Its
    logits are moved from the one to the other, so that a teacher trained by plain cross-entropy does not pull a student
    of balanced softmax back to the frequent classes.

    Args:
        recipe: the student's, which names the teacher.
        data: what the student's run trains on and holds out.

    Raises:
        RecipeError: if the recipe names no teacher.
        RunError: if the teacher's training is not finished, or was on other images than the student's: it would know
            those that scalar and temperature are fitted on.
    """

    def __init__(self, recipe: Recipe, data: Dataset, device: torch.device) -> None:
        run, network, taught_by, meta = load_teacher(recipe)
        check_data(run, meta, data)
        counts_K = data.train.labels.bincount(minlength=len(data.classes)).numpy()
        ratio_K = logit_prior(recipe, counts_K) / logit_prior(taught_by, counts_K)
        self.shift_K = torch.from_numpy(ratio_K).log().float().to(device)
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.temperature = recipe.distill.temperature
        self.precision = recipe.fit.precision
        self.meta: dict[str, Any] = {"weights": weights_digest(network), "recipe": taught_by.shown()}

    def compile(self) -> None:
        """Compile the network with its weights as constants, which makes it more than twice as fast."""
        self.network = torch.compile(self.network, dynamic=False, options={"freezing": True})  # type: ignore[assignment]

    def loss(self, images_BHWC: Tensor, logits_BK: Tensor) -> Tensor:
        """T²·KL(softmax(z_T/T) ‖ softmax(z/T)), summed over the batch, of the student's logits z for these images.

        The teacher's z_T are for the very images that the student sees, augmented alike.
        """
        with (
            torch.no_grad(),
            torch.autocast(images_BHWC.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            taught_BK = self.network(images_BHWC).float() + self.shift_K
        t = self.temperature
        divergence: Tensor = functional.kl_div(
            (logits_BK.float() / t).log_softmax(dim=1),
            (taught_BK / t).log_softmax(dim=1),
            reduction="sum",
            log_target=True,
        )
        return t**2 * divergence


def load_teacher(recipe: Recipe) -> tuple[Run, LongTailClassifier, Recipe, dict[str, Any]]:
    """The run that a recipe names as its teacher, its network, recipe and metadata; raises as `Teacher` does."""
    if recipe.distill.teacher is None:
        raise RecipeError(
            f"distill.weight is {recipe.distill.weight:g}, which needs a teacher: pass --set distill.teacher=RUN, or "
            "have one trained first, such as by --set distill.set=fit.epochs=400"
        )
    run = Run(recipe.distill.teacher)
    network, taught_by, meta = load_finished(run)
    _check_same_images(run, taught_by, recipe)
    return run, network, taught_by, meta


def weights_digest(network: LongTailClassifier) -> str:
    """By which a result knows its teacher: 16 hexadecimal digits."""
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in network.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def _check_same_images(run: Run, taught_by: Recipe, recipe: Recipe) -> None:
    """Of the two recipes, all that decides which images there are, of which size, and which of them are held out."""
    theirs, ours = ({"seed": r.seed} | r.data.model_dump(exclude={"root", "mean", "std"}) for r in (taught_by, recipe))
    for key, value in ours.items():
        if theirs[key] != value:
            name = key if key == "seed" else f"data.{key}"
            raise RunError(
                f"distill.teacher {run.path} was trained with {name} = {theirs[key]}, this recipe has {value}: it must "
                "be the same, so that both hold out the same images"
            )
