from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from starlette.requests import Request

from camcal.service.http.dependencies import unless_gone
from camcal.service.http.errors import Problem


def test_client_that_leaves_several_answers_leaves_no_trace() -> None:
    told = list[dict[str, Any]]()

    async def left() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        with pytest.raises(Problem, match="left"):
            answers = asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))
            await unless_gone(Request({"type": "http"}, left), answers)
        del answers
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(ask())
    assert told == []
