"""Labelled images as tensors, from any of the sources that a recipe can name."""

from camcal.training.data.dataset import DataError, Dataset, Images, LabelledImages
from camcal.training.data.sources import load_dataset

__all__ = ["DataError", "Dataset", "Images", "LabelledImages", "load_dataset"]
