"""From labelled photographs to a checked bundle: data, fit, calibration, report, export."""

import models as models  # before anything that imports ONNX Runtime: it switches off the usage reports of that
