"""Clients who mean well: photographs in every form, heatmaps in every format, tensors, and what a monitor asks."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson

from tests.benchmarks.serving.photos import write_photos
from tests.soak.journal import Journal

MIX = {"predict": 40, "predict-form": 20, "batch": 4, "cam": 22, "v2-json": 2, "v2-binary": 4, "other": 8}
CAM_FORMATS = ("png", "webp", "jpeg", "json", "npy")
OTHER = ("/", "/model", "/metrics", "/health/live", "/health/ready", "/openapi.json", "/v2")
FRESH = 0.2  # share of requests over a connection of their own
WAITING = 200  # requests under way at once; more are not sent, as a client that gives up
GIVE_UP_S = 30.0
BEHIND_S = 1.0  # a request that could not be sent by then is dropped: the load generator itself is too slow
RECENT = 50  # predictions whose heatmaps are asked for


class Traffic:
    """Requests of the mix, and their outcomes in a journal."""

    def __init__(self, url: str, journal: Journal, photos: Path, seed: int):
        self._journal = journal
        self._random = random.Random(seed)
        self._photos = [path.read_bytes() for path in write_photos(photos, count=24)]
        self._maps: deque[str] = deque(maxlen=RECENT)
        limits = httpx.Limits(max_connections=WAITING, max_keepalive_connections=32, keepalive_expiry=20)
        self._kept = httpx.AsyncClient(base_url=url, limits=limits, timeout=GIVE_UP_S, trust_env=False)
        lone = httpx.Limits(max_connections=WAITING, max_keepalive_connections=0)
        self._fresh = httpx.AsyncClient(base_url=url, limits=lone, timeout=GIVE_UP_S, trust_env=False)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Traffic]:
        async with self._kept, self._fresh:
            model = (await self._fresh.get("/model")).raise_for_status().json()
            self._infer = f"/v2/models/{model['name']}/infer"
            self._tensors = self._make_tensors((await self._fresh.get(self._infer.removesuffix("/infer"))).json())
            yield self

    async def capacity(self, seconds: float, clients: int = 8) -> float:
        """Requests of the mix answered per second when every client asks again at once."""
        end = self._journal.now() + seconds
        answered = 0

        async def ask() -> None:
            nonlocal answered
            while self._journal.now() < end:
                await self._one("calibration")
                answered += 1

        await asyncio.gather(*(ask() for _ in range(clients)))
        return answered / seconds

    async def run(self, rate: float) -> None:
        """Poisson arrivals, `rate` a second, until it is cancelled. Latency counts from when a request was due."""
        due, tasks = self._journal.now(), set[asyncio.Task[None]]()
        async with asyncio.TaskGroup() as group:
            while True:
                due += self._random.expovariate(rate)
                await asyncio.sleep(max(0.0, due - self._journal.now()))
                if self._journal.now() - due > BEHIND_S:
                    self._journal.note("unsent", "late", due)
                elif len(tasks) < WAITING:
                    tasks.add(task := group.create_task(self._one(None, due)))
                    task.add_done_callback(tasks.discard)
                else:
                    self._journal.note("unsent", "left", due)

    async def _one(self, name: str | None, due: float | None = None) -> None:
        kind = self._random.choices(list(MIX), list(MIX.values()))[0]
        client = self._fresh if self._random.random() < FRESH else self._kept
        began = self._journal.now() if due is None else due
        outcome = await asked(client, **self._request(kind), on_answer=self._remember)
        self._journal.note(name or kind, outcome, began)

    def _request(self, kind: str) -> dict[str, Any]:
        photo = self._random.choice(self._photos)
        match kind:
            case "cam" if self._maps:
                format = self._random.choice(CAM_FORMATS)
                return {"method": "GET", "url": self._random.choice(self._maps), "params": {"format": format}}
            case "predict-form":
                return {"method": "POST", "url": "/predict", "files": {"image": photo}}
            case "batch":
                photos = self._random.choices(self._photos, k=self._random.randint(2, 8))
                return {"method": "POST", "url": "/predict/batch", "files": [("image", photo) for photo in photos]}
            case "v2-json" | "v2-binary":
                content, headers = self._tensors[kind]
                return {"method": "POST", "url": self._infer, "content": content, "headers": headers}
            case "other":
                return {"method": "GET", "url": self._random.choice(OTHER)}
            case _:
                params = {"top_k": self._random.randint(1, 10), "logits": self._random.choice(("none", "all"))}
                headers = {"Content-Type": "image/jpeg"}
                return {"method": "POST", "url": "/predict", "content": photo, "headers": headers, "params": params}

    def _remember(self, response: httpx.Response) -> None:
        if response.status_code == 404 and response.url.path in self._maps:
            self._maps.remove(response.url.path)
        elif response.status_code == 200 and response.url.path == "/predict":
            self._maps.append(response.json()["cam"]["url"])

    def _make_tensors(self, metadata: dict[str, Any]) -> dict[str, tuple[bytes, dict[str, str]]]:
        """Two requests of the Open Inference Protocol: one image as JSON, and two as bytes."""
        size = metadata["inputs"][0]["shape"][1]
        images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        tensor: dict[str, Any] = {"name": "images", "datatype": "UINT8"}
        one = {**tensor, "shape": [1, size, size, 3], "data": images[0].ravel().tolist()}
        two = {**tensor, "shape": [2, size, size, 3], "parameters": {"binary_data_size": images.nbytes}}
        head = orjson.dumps({"inputs": [two], "outputs": [{"name": "calibrated_probabilities"}]})
        length = {"Inference-Header-Content-Length": str(len(head))}
        return {"v2-json": (orjson.dumps({"inputs": [one]}), {}), "v2-binary": (head + images.tobytes(), length)}


async def asked(client: httpx.AsyncClient, on_answer: Any = None, **request: Any) -> str:
    """The outcome of one request."""
    try:
        response = await client.request(**request)
    except httpx.ConnectError:
        return "refused"
    except httpx.TimeoutException:
        return "timeout"
    except httpx.TransportError:
        return "reset"
    if on_answer is not None:
        on_answer(response)
    return str(response.status_code)
