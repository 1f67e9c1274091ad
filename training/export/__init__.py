"""From a calibrated network to a verified bundle."""
