"""Image files that are made to do harm, built by code: bombs, endless headers, lies about sizes, polyglots.

`CASES` maps a file name to the function that builds the file. Files are built when asked for, since some have 19 MB.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.service.crafted import bmp, gif, jpeg, other, png, webp
from tests.service.crafted.seeds import SEEDS as SEEDS

CASES: dict[str, Callable[[], bytes]] = {
    name: build for module in (jpeg, png, webp, gif, bmp, other) for name, build in module.CASES.items()
}
