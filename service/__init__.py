"""From a bundle to HTTP: decoding, batching, inference, heatmaps."""

import models as models  # before anything that imports ONNX Runtime: it switches off the usage reports of that
