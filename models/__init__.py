"""What a model is: the networks, and the bundle that carries one to the service."""

import os

# ONNX Runtime's official builds report usage to their maker unless this is set before their first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
