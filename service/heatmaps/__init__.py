"""Heatmaps: what is kept of a prediction, where, and how it is drawn."""
