"""Serves a bundle over HTTP: decoding, batching, inference and heatmaps."""
