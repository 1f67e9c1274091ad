"""Classify one image: decoding, batching, inference and ranking; loading and reloading of the model."""
