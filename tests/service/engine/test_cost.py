"""Memory estimates compared with measured peaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camcal.service.engine.cost import FIXED_BYTES
from tests.service.conftest import encoded, picture
from tests.service.crafted import CASES
from tests.service.crafted.seeds import deep

ROOT = Path(__file__).resolve().parents[3]
SIDE = 1800

# Each file is decoded in its own child process, so that none reuses memory that another has freed.
MEASURE = """
import json, os, sys
from camcal.models.headers import read_header
from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.cost import cost
from camcal.service.engine.decoding import Limits, decode, shrink_of
rule = Preprocessing(fit="stretch", resize=112, input_size=112, mean=(0.5,) * 3, std=(0.5,) * 3)
limits = Limits(max_bytes=10**9, max_pixels=10**9)

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def measured(data):
    ours, theirs = os.pipe()
    if not os.fork():
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        decode(data, rule, limits)
        os.write(theirs, str(peak() - before).encode())
        os._exit(0)
    assert os.wait()[1] == 0
    return int(os.read(ours, 100))

for path in sys.argv[1:]:
    data = open(path, "rb").read()
    header = read_header(data)
    print(json.dumps([path, measured(data), cost(header, len(data), shrink_of(header, rule, True)).nbytes]))
"""


def noise(mode: str, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """An image with enough detail that its file is not small."""
    return picture(size=(size[0] // 8, size[1] // 8), mode="RGB").resize(size).convert(mode)


def noise_file(mode: str, format: str, size: tuple[int, int], **options: Any) -> bytes:
    return encoded(noise(mode, size), format, **options)


def sixteen(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.asarray(noise("L", size)).astype(np.uint16) * 257)


KINDS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("grey", "L", "JPEG", {}),
    ("rgb", "RGB", "JPEG", {}),
    ("progressive", "RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    ("cmyk", "CMYK", "JPEG", {"progressive": True}),
    ("one-bit", "1", "PNG", {}),
    ("grey", "L", "PNG", {}),
    ("grey-alpha", "LA", "PNG", {}),
    ("palette", "P", "PNG", {"transparency": 3}),
    ("rgb", "RGB", "PNG", {}),
    ("rgba", "RGBA", "PNG", {}),
    ("palette", "P", "GIF", {"transparency": 3}),
    ("one-bit", "1", "BMP", {}),
    ("rgb", "RGB", "BMP", {}),
    ("rgba", "RGBA", "BMP", {}),
    ("rgb", "RGB", "WEBP", {"method": 0}),
    ("rgba", "RGBA", "WEBP", {"method": 0}),
]
SHAPES = {"square": (SIDE, SIDE), "tall": (50, 65_000), "wide": (65_000, 50)}
FILES: dict[str, Callable[[], bytes]] = {
    f"{name}-{shape}.{format.lower()}": partial(noise_file, mode, format, size, **options)
    for shape, size in SHAPES.items()
    for name, mode, format, options in KINDS
    if format != "WEBP" or shape == "square"
}
FILES |= {"sixteen.png": lambda: encoded(sixteen((SIDE, SIDE))), "deep.png": lambda: deep(6, "RGBA")}
FILES |= {name: CASES[name] for name in ("profile-parts.jpg", "exif-entries.webp", "animation-many-frames.webp")}
FILES |= {name: CASES[name] for name in ("tiny-chunks.webp", "exif-entries.png", "comments-after.gif")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_estimate_is_a_close_upper_bound(tmp_path: Path) -> None:
    for name, build in FILES.items():
        (tmp_path / name).write_bytes(build())
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *sorted(map(str, tmp_path.iterdir()))],
        cwd=ROOT,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == len(FILES)
    print(
        *(f"{Path(path).name:30s} {peak / 1e6:7.1f} {estimate / 1e6:7.1f} MB" for path, peak, estimate in rows),
        sep="\n",
    )
    assert [row for row in rows if row[1] > row[2]] == []
    ordinary = [row for row in rows if Path(row[0]).name not in CASES]
    assert [row for row in ordinary if row[2] > 3 * row[1] + 2 * FIXED_BYTES] == []
