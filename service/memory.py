"""Returns freed memory to the operating system."""

from __future__ import annotations

import ctypes
import platform


def release_memory() -> None:
    """Release the pages that the C library keeps of freed memory; does nothing where that is not glibc.

    glibc keeps them for later. After a reload under load that is most of the replaced model, in every worker.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
