"""Gives a bundle that has none the answers to hold it to."""

from __future__ import annotations

from pathlib import Path

from camcal.models import answers
from camcal.models.bundle import Bundle, write_bundle
from camcal.service.engine.session import Session


def add_canary(folder: Path) -> Bundle:
    """Record what the graph answers now, on the CPU, and return the bundle with it; its other files stay.

    Raises:
        BundleError: if the folder is not a bundle, or its answers are none that a service would give.
    """
    bundle = Bundle.load(folder)
    session = Session(bundle, device="cpu")
    canary = answers.record(lambda images, top_k: vars(session.run(images, top_k)), bundle.manifest)
    write_bundle(folder, bundle.manifest, canary)
    return Bundle.load(folder)
