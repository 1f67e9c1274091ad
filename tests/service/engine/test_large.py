"""Large images, decoded by the real decoder process."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np
import pytest

from camcal.models.bundle import Bundle
from camcal.models.preprocessing import Preprocessing
from camcal.service.engine import large
from camcal.service.engine.admission import QueueFullError
from camcal.service.engine.cost import Cost
from camcal.service.engine.deadline import DeadlineError
from camcal.service.engine.decoding import (
    Data,
    ImageTooLargeError,
    LargeImageError,
    Limits,
    UndecodableImageError,
    UnsupportedFormatError,
    decode,
)
from camcal.service.engine.large import WAITING, DecoderError, DecoderProcess, LargeImages
from tests.service.conftest import encoded, picture, png
from tests.service.crafted import CASES, SEEDS
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import metric, process, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the process needs Linux")

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[3]
RULE = Preprocessing(fit="crop", resize=36, input_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LIMITS = Limits(max_bytes=20_000_000, max_pixels=50_000_000, large_bytes=512 * 2**20, decode_cpu_s=2.0)
MAX_WAITING_BYTES = 30_000_000


@asynccontextmanager
async def large_images(limits: Limits = LIMITS, patch: str = "") -> AsyncIterator[tuple[LargeImages, DecoderProcess]]:
    """Start the decoder process. The code `patch` can change its module `decoder`."""
    loop = asyncio.get_running_loop()
    if not patch:
        decoder = DecoderProcess(loop.add_reader, loop.remove_reader)
        try:
            yield LargeImages(decoder.mailbox, limits, MAX_WAITING_BYTES), decoder
        finally:
            decoder.close()
        return
    decoder = DecoderProcess(lambda descriptor, act: None, lambda descriptor: None)
    run = f"decoder.main({decoder.mailbox.fileno()})"
    code = f"import os, signal, time\nfrom camcal.service.engine import decoder\n{patch}\n{run}"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, pass_fds=[decoder.mailbox.fileno()]) as child:
        try:
            yield LargeImages(decoder.mailbox, limits, MAX_WAITING_BYTES), decoder
        finally:
            child.kill()
            decoder.close()


def image(data: Data, nbytes: int = 600 * 2**20) -> LargeImageError:
    return LargeImageError(data, Cost(cpu_s=1.0, nbytes=nbytes))


def run(work: Callable[[LargeImages, DecoderProcess], Awaitable[T]], limits: Limits = LIMITS, patch: str = "") -> T:
    async def main() -> T:
        async with large_images(limits, patch) as (images, decoder), asyncio.timeout(300):  # it has the lowest priority
            return await work(images, decoder)

    return asyncio.run(main())


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("with_picture", [True, False])
def test_result_equals_decoding_in_this_process(name: str, with_picture: bool) -> None:
    data = SEEDS[name]()

    async def work(images: LargeImages, decoder: DecoderProcess) -> None:
        # A memoryview, like the part of a form.
        result = await images.decode(image(memoryview(data)), RULE, picture=with_picture, deadline=math.inf)
        expected = decode(data, RULE, LIMITS, picture=with_picture)
        np.testing.assert_array_equal(result.pixels, expected.pixels)
        assert (result.width, result.height) == (expected.width, expected.height)
        assert (result.picture, result.picture_size) == (expected.picture, expected.picture_size)

    run(work)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"no image", UnsupportedFormatError),
        (CASES["no-end.jpg"](), UndecodableImageError),
        (CASES["one-column.png"](), ImageTooLargeError),
    ],
)
def test_bad_images_have_the_same_error_messages(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as expected:
        decode(data, RULE, LIMITS)
    with pytest.raises(error) as raised:
        run(lambda images, _: images.decode(image(data), RULE, picture=True, deadline=math.inf))
    assert str(raised.value) == str(expected.value)


def test_large_images_queue_up_and_the_decoder_ends_with_the_service() -> None:
    async def work(images: LargeImages, decoder: DecoderProcess) -> int:
        tasks = [images.decode(image(CASES["one-bit.png"]()), RULE, picture=True, deadline=math.inf) for _ in range(2)]
        assert {(result.width, result.height) for result in await asyncio.gather(*tasks)} == {(7071, 7071)}
        assert images.waiting == images.waiting_bytes == 0
        assert decoder.pid is not None
        return decoder.pid

    pid = run(work)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_a_decoder_process_a_thread_decodes() -> None:
    async def main() -> None:
        images = LargeImages(None, LIMITS, MAX_WAITING_BYTES)
        result = await images.decode(image(png()), RULE, picture=True, deadline=math.inf)
        np.testing.assert_array_equal(result.pixels, decode(png(), RULE, LIMITS).pixels)
        with pytest.raises(UndecodableImageError):
            await images.decode(image(CASES["no-end.jpg"]()), RULE, picture=True, deadline=math.inf)
        with pytest.raises(DeadlineError):
            await images.decode(image(png()), RULE, picture=True, deadline=time.monotonic())
        images.close()

    asyncio.run(main())


def test_too_many_images_are_rejected() -> None:
    async def work(images: LargeImages, decoder: DecoderProcess) -> None:
        data = encoded(picture())
        waiting = [
            asyncio.ensure_future(images.decode(image(data), RULE, picture=True, deadline=math.inf))
            for _ in range(WAITING)
        ]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as raised:
            await images.decode(image(data), RULE, picture=True, deadline=math.inf)
        assert raised.value.reason == "large_images"
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert images.waiting == images.waiting_bytes == 0

    run(work, patch="decoder.decode = lambda *a, **k: time.sleep(60)")


def test_too_many_waiting_bytes_are_rejected() -> None:
    async def work(images: LargeImages, decoder: DecoderProcess) -> None:
        data = bytearray(MAX_WAITING_BYTES * 2 // 3)
        first = asyncio.ensure_future(images.decode(image(data), RULE, picture=True, deadline=math.inf))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await images.decode(image(data), RULE, picture=True, deadline=math.inf)
        with pytest.raises(ImageTooLargeError, match="has 20000000 bytes; the limit is 1000"):
            await first

    run(work, limits=Limits(max_bytes=1000, max_pixels=1000, decode_cpu_s=2.0))


def test_cpu_time_is_limited() -> None:
    patch = "decoder.decode = lambda *a, **k: [None for _ in iter(int, 1)]"
    limits = Limits(max_bytes=1000, max_pixels=1000, decode_cpu_s=1.0)
    with pytest.raises(ImageTooLargeError, match=r"takes more than 1 s of CPU time \(CAMCAL_DECODE_CPU_S\)"):
        run(lambda images, _: images.decode(image(b"x"), RULE, picture=True, deadline=math.inf), limits, patch)


def test_memory_is_limited() -> None:
    patch = "decoder.decode = lambda *a, **k: bytearray(300 * 2**20)"
    with pytest.raises(MemoryError):
        run(
            lambda images, _: images.decode(image(b"x", 100 * 2**20), RULE, picture=True, deadline=math.inf),
            patch=patch,
        )


def test_crash_affects_only_its_own_image() -> None:
    patch = (
        "real = decoder.decode\n"
        "def crash(data, *a, **k):\n"
        "    return real(data, *a, **k) if len(data) > 1 else os.kill(os.getpid(), signal.SIGSEGV)\n"
        "decoder.decode = crash"
    )

    async def work(images: LargeImages, decoder: DecoderProcess) -> None:
        with pytest.raises(UndecodableImageError, match="the decoder was killed by signal 11"):
            await images.decode(image(b"x"), RULE, picture=True, deadline=math.inf)
        assert (await images.decode(image(png()), RULE, picture=True, deadline=math.inf)).width == 60

    run(work, patch=patch)


def test_decoding_stops_at_the_deadline_and_on_cancellation() -> None:
    """Otherwise the next image would wait for a minute."""
    patch = (
        "real = decoder.decode\ndecoder.decode = lambda d, *a, **k: real(d, *a, **k) if len(d) > 1 else time.sleep(60)"
    )

    async def work(images: LargeImages, decoder: DecoderProcess) -> None:
        assert (await images.decode(image(png()), RULE, picture=True, deadline=math.inf)).width == 60
        with pytest.raises(DeadlineError):
            await images.decode(image(b"x"), RULE, picture=True, deadline=time.monotonic() + 0.2)
        cancelled = asyncio.ensure_future(images.decode(image(b"x"), RULE, picture=True, deadline=math.inf))
        while not images.waiting:
            await asyncio.sleep(0)
        cancelled.cancel()
        assert (await images.decode(image(png()), RULE, picture=True, deadline=math.inf)).width == 60

    run(work, patch=patch)


def test_killed_process_is_replaced() -> None:
    async def work(images: LargeImages, decoder: DecoderProcess) -> None:
        assert (await images.decode(image(png()), RULE, picture=True, deadline=math.inf)).width == 60
        first = decoder.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        waiting = asyncio.ensure_future(images.decode(image(png()), RULE, picture=True, deadline=math.inf))
        while not images.waiting:
            await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(DecoderError, match="ended before it responded"):
            await waiting
        assert (await images.decode(image(png()), RULE, picture=True, deadline=math.inf)).width == 60
        assert decoder.pid != first

    run(work)


def test_idle_process_exits_and_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "IDLE_S", 0.1)

    async def work(images: LargeImages, decoder: DecoderProcess) -> None:
        for _ in range(2):
            assert (await images.decode(image(png()), RULE, picture=True, deadline=math.inf)).width == 60
            while decoder.pid is not None:
                await asyncio.sleep(0.01)

    run(work)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_process_for_the_whole_service(bundle: Bundle, workers: str) -> None:
    with process(bundle, CAMCAL_WORKERS=workers) as (child, url):
        for _ in range(4):  # over separate connections, so that each worker gets some
            response = httpx.post(f"{url}/predict", content=png(size=(2000, 1500)), headers=RAW, timeout=60)
            assert response.status_code == 200
            assert response.json()["image"] == {"width": 2000, "height": 1500}
        wait_for(lambda: len(decoders_of(child.pid)) == 1)  # after the child of the last image has ended
        decoders = decoders_of(child.pid)
        assert os.getpriority(os.PRIO_PROCESS, decoders[0]) == 19
        if workers == "1":
            assert metric(url, "camcal_large_images_total") == 4
        child.kill()
        wait_for(lambda: not any(map(command, decoders)))


def decoders_of(pid: int) -> list[int]:
    return [child for child in descendants(pid) if "camcal.service.engine.decoder" in command(child)]


def descendants(pid: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
