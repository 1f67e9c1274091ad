"""From labelled photographs to a verified bundle: data, fit, calibration, report, export."""
