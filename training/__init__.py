"""From labelled photographs to a checked bundle: data, fit, calibration, report, export."""
