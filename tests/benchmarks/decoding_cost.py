"""What decoding costs beside what `service.engine.cost` estimates: python -m tests.benchmarks.decoding_cost FOLDER

Each file is decoded in a child process of its own. Estimates are for one core of an EPYC at 2.6 GHz; on another
machine all ratios of time shift together.
"""

from __future__ import annotations

import argparse
import os
import resource
from pathlib import Path

from camcal.models.headers import read_header
from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.cost import cost
from camcal.service.engine.decoding import Limits, decode, shrink_of

RULE = Preprocessing(fit="stretch", resize=112, input_size=112, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LIMITS = Limits(max_bytes=10**9, max_pixels=10**9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in sorted(parser.parse_args().folder.iterdir()):
        data = path.read_bytes()
        try:
            header = read_header(data)
        except ValueError as error:
            print(f"{path.name:32s} {error}")
            continue
        expected = cost(header, len(data), shrink_of(header, RULE, picture=True))
        taken_s = cpu_seconds(data)
        print(
            f"{path.name:32s} {header.width:6d}×{header.height:<6d} {taken_s * 1e3:7.1f} ms, "
            f"estimated {expected.cpu_s * 1e3:7.1f} ms and {expected.nbytes / 2**20:6.1f} MiB"
        )


def cpu_seconds(data: bytes) -> float:
    """CPU time of decoding `data` in a child, a refusal included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        try:
            decode(data, RULE, LIMITS)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
