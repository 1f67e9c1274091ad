from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from camcal.service.background import in_background


def test_result_and_error_come_back() -> None:
    def fail() -> int:
        raise ArithmeticError("boom")

    assert asyncio.run(in_background(threading.get_ident)) != threading.get_ident()
    with pytest.raises(ArithmeticError, match="boom"):
        asyncio.run(in_background(fail))


def test_endless_work_does_not_delay_exit() -> None:
    code = (
        "import asyncio, threading\n"
        "from camcal.service.background import in_background\n"
        "async def main():\n"
        "    task = asyncio.ensure_future(in_background(threading.Event().wait))\n"
        "    await asyncio.sleep(0)\n"
        "    task.cancel()\n"
        "asyncio.run(main())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60)
    assert result.returncode == 0
