"""Classify one image: decoding, batching, inference, ranking, and the life of the model."""
