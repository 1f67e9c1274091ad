"""Train image classifiers on long-tailed data; serve calibrated probabilities with exact heatmaps.

`__all__` is the public Python API. Each name is imported on first use, so that `import camcal` loads neither torch nor
ONNX Runtime. The folders `models`, `training` and `service` of the repository are the packages `camcal.models`,
`camcal.training` and `camcal.service`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Official builds of ONNX Runtime send telemetry unless this is set before their first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    __version__: str

    from camcal.models.bundle import Bundle as Bundle
    from camcal.models.bundle import BundleError as BundleError
    from camcal.models.bundle import Manifest as Manifest
    from camcal.service.http.app import create_app as create_app
    from camcal.service.settings import Settings as Settings
    from camcal.service.settings import load_settings as load_settings

_HOMES = {
    "Bundle": "camcal.models.bundle",
    "BundleError": "camcal.models.bundle",
    "Manifest": "camcal.models.bundle",
    "Settings": "camcal.service.settings",
    "create_app": "camcal.service.http.app",
    "load_settings": "camcal.service.settings",
}

__all__ = ["Bundle", "BundleError", "Manifest", "Settings", "__version__", "create_app", "load_settings"]


def _version() -> str:
    """The version as installed, or as in the clone's pyproject.toml if camcal runs without being installed."""
    import tomllib
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("camcal")
    except metadata.PackageNotFoundError:
        text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
        return str(tomllib.loads(text)["project"]["version"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
