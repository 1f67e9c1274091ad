"""The serving commands of `camcal`."""
