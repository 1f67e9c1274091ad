"""From a bundle to HTTP: decoding, batching, inference, heatmaps."""
