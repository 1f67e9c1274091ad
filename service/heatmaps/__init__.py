"""Heatmaps: the data stored for a prediction, the stores, and drawing."""
