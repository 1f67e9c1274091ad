"""Labelled images as tensors, from any of the sources that a recipe can name."""

from training.data.dataset import DataError, Dataset, Images, LabelledImages
from training.data.sources import load_dataset

__all__ = ["DataError", "Dataset", "Images", "LabelledImages", "load_dataset"]
