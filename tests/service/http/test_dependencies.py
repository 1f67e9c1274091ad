from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from starlette.requests import Request

from camcal.service.http.dependencies import while_connected
from camcal.service.http.errors import Problem


def test_disconnect_during_several_tasks_logs_nothing() -> None:
    logged = list[dict[str, Any]]()

    async def disconnect() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: logged.append(context))
        with pytest.raises(Problem, match="disconnected"):
            work = asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))
            await while_connected(Request({"type": "http"}, disconnect), work)
        del work
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(ask())
    assert logged == []
