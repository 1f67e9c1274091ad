"""One parser under atheris, which looks for inputs that reach new code. A process of its own: atheris ends it.

    PYTHONPATH=.venv-bench/fuzz python -m tests.fuzz.guided TARGET RUNS SEED FOLDER

FOLDER takes the inputs that were found, and one that fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["camcal.service.http.multipart", "camcal.service.http.inference_protocol", "camcal.models"]
):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run until `RUNS` inputs were tried or one failed, which is written to `FOLDER/crash-…`."""
    name, runs, seed, folder = sys.argv[1:]
    corpus = Path(folder) / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [f"-runs={runs}", f"-seed={seed}", "-timeout=10", "-max_len=20000", "-rss_limit_mb=2000"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={folder}/", *options], TARGETS[name].check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
