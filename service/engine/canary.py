"""Add a canary to a bundle: recorded outputs on test images, which are compared whenever the bundle is loaded."""

from __future__ import annotations

from pathlib import Path

from camcal.models import answers
from camcal.models.bundle import Bundle, write_bundle
from camcal.service.engine.session import Session


def add_canary(folder: Path) -> Bundle:
    """Record the graph's current outputs on the CPU, and return the bundle with them. Its other files stay unchanged.

    Raises:
        BundleError: if the folder is not a bundle, or its outputs are invalid.
    """
    bundle = Bundle.load(folder)
    session = Session(bundle, device="cpu")
    canary = answers.record(lambda images, top_k: vars(session.run(images, top_k)), bundle.manifest)
    write_bundle(folder, bundle.manifest, canary)
    return Bundle.load(folder)
