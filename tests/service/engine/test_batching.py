from __future__ import annotations

import asyncio
import logging
import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from camcal.service.engine.batching import Batcher, BatchReport, ClosedError, InferenceError, InferenceResult
from camcal.service.engine.deadline import DeadlineError
from camcal.service.engine.session import ImageBatch, Outputs


def image(value: int) -> NDArray[np.uint8]:
    return np.full((2, 2, 3), value, dtype=np.uint8)


class Device:
    """Returns each image's value as its logit. Blocks while the gate is closed, and fails on the value 255."""

    def __init__(self) -> None:
        self.runs = (self,)
        self.gate = threading.Event()
        self.batches: list[tuple[list[int], int]] = []
        self.alone: dict[int, bool] = {}  # by the first value of a batch

    def __call__(self, images: ImageBatch, top_k: int, alone: bool) -> Outputs:
        values = np.stack(list(images))[:, 0, 0, 0].astype(np.float32)[:, None]
        self.alone[int(values[0, 0])] = alone
        self.batches.append(([int(v) for v in values[:, 0]], top_k))
        assert self.gate.wait(10)
        if 255 in values:
            raise ArithmeticError("boom")
        classes = np.zeros((len(images), 1), dtype=np.int64)
        maps = values[:, :, None, None]
        return Outputs(
            logits=values,
            calibrated_logits=values,
            probabilities=values,
            calibrated_probabilities=values,
            top_classes=classes,
            maps=maps,
        )

    async def entered(self, batches: int) -> None:
        while len(self.batches) < batches:
            await asyncio.sleep(0.001)


def value(answer: InferenceResult) -> int:
    return int(answer.outputs.logits[answer.row, 0])


def test_idle_device_starts_at_once_and_batch_grows_while_it_is_busy() -> None:
    device, reports = Device(), list[BatchReport]()

    async def main() -> list[int]:
        batcher = Batcher(max_batch=3, on_batch=reports.append)
        first = asyncio.ensure_future(batcher.submit(device.runs, image(0), 1))
        await device.entered(1)
        later = [asyncio.ensure_future(batcher.submit(device.runs, image(i), top_k=i)) for i in range(1, 6)]
        await asyncio.sleep(0.02)
        device.gate.set()
        answers = [value(answer) for answer in await asyncio.gather(first, *later)]
        await batcher.close()
        return answers

    assert asyncio.run(main()) == [0, 1, 2, 3, 4, 5]
    assert device.batches == [([0], 1), ([1, 2, 3], 3), ([4, 5], 5)]
    assert [report.size for report in reports] == [1, 3, 2]
    assert reports[0].inference_s > 0.015


def test_cancelled_image_is_skipped_without_affecting_others() -> None:
    device = Device()

    async def main() -> None:
        batcher = Batcher(max_batch=8)
        running = asyncio.ensure_future(batcher.submit(device.runs, image(0), 1))
        await device.entered(1)
        cancelled = asyncio.ensure_future(batcher.submit(device.runs, image(1), 1))
        waiting = asyncio.ensure_future(batcher.submit(device.runs, image(2), 1))
        await asyncio.sleep(0)
        cancelled.cancel()
        running.cancel()  # too late to skip: its batch continues, and the result is dropped
        await asyncio.sleep(0)
        device.gate.set()
        assert value(await waiting) == 2
        await batcher.close()

    asyncio.run(main())
    assert device.batches == [([0], 1), ([2], 1)]


def test_cancelled_in_the_same_loop_iteration_as_the_dispatch() -> None:
    device = Device()

    async def main() -> None:
        batcher = Batcher(max_batch=8)
        running = asyncio.ensure_future(batcher.submit(device.runs, image(0), 1))
        await device.entered(1)
        cancelled = asyncio.ensure_future(batcher.submit(device.runs, image(1), 1))
        await asyncio.sleep(0)
        device.gate.set()
        # The batch ends while the event loop is blocked, so both happen in its next iteration.
        batcher._threads[0].submit(lambda: None).result(20)
        cancelled.cancel()
        await running
        await batcher.close()

    asyncio.run(main())
    assert device.batches == [([0], 1)]


def test_deadline_passes_even_while_the_device_is_stuck() -> None:
    device = Device()

    async def main() -> None:
        batcher = Batcher(max_batch=8)
        running = asyncio.ensure_future(batcher.submit(device.runs, image(0), 1, deadline=time.monotonic() + 0.05))
        await device.entered(1)
        with pytest.raises(DeadlineError):
            await batcher.submit(device.runs, image(1), 1, deadline=time.monotonic() + 0.05)
        with pytest.raises(DeadlineError):
            await batcher.submit(device.runs, image(2), 1, deadline=time.monotonic() - 1)
        device.gate.set()
        assert value(await running) == 0  # dispatched before its deadline
        await batcher.close()

    asyncio.run(main())
    assert device.batches == [([0], 1)]


def test_failed_batch_does_not_stop_the_batcher(caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    device.gate.set()

    async def main() -> None:
        batcher = Batcher(max_batch=8)
        with pytest.raises(InferenceError) as caught:
            await batcher.submit(device.runs, image(255), 1)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert value(await batcher.submit(device.runs, image(7), 1)) == 7
        await batcher.close()

    with caplog.at_level(logging.ERROR, "camcal"):
        asyncio.run(main())
    assert "inference failed on a batch of 1" in caplog.text


def test_close_finishes_the_queue_and_accepts_no_more() -> None:
    device = Device()

    async def main() -> None:
        batcher = Batcher(max_batch=1)
        waiting = [asyncio.ensure_future(batcher.submit(device.runs, image(i), 1)) for i in range(3)]
        await device.entered(1)
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await batcher.submit(device.runs, image(9), 1)
        device.gate.set()
        await closing
        assert [value(answer) for answer in await asyncio.gather(*waiting)] == [0, 1, 2]

    asyncio.run(main())


def test_on_dispatch_is_called() -> None:
    device, calls = Device(), list[str]()
    device.gate.set()

    async def main() -> None:
        batcher = Batcher(max_batch=1)
        answer = await batcher.submit(device.runs, image(1), 1, on_dispatch=lambda: calls.append("left"))
        assert answer.queue_s >= 0
        await batcher.close()

    asyncio.run(main())
    assert calls == ["left"]


def test_models_never_share_a_batch() -> None:
    old, new = Device(), Device()

    async def main() -> list[int]:
        batcher = Batcher(max_batch=8)
        tasks = [asyncio.ensure_future(batcher.submit(old.runs, image(0), 1))]
        await old.entered(1)
        for i, device in enumerate((old, new, old, new, new), 1):
            tasks.append(asyncio.ensure_future(batcher.submit(device.runs, image(i), 1)))
        await asyncio.sleep(0)
        old.gate.set()
        new.gate.set()
        answers = [value(answer) for answer in await asyncio.gather(*tasks)]
        await batcher.close()
        return answers

    assert asyncio.run(main()) == [0, 1, 2, 3, 4, 5]
    assert old.batches == [([0], 1), ([1, 3], 1)]
    assert new.batches == [([2, 4, 5], 1)]


def test_lanes_run_concurrently() -> None:
    one, other = Device(), Device()
    runs = (one, other)

    async def main() -> list[int]:
        batcher = Batcher(lanes=2, max_batch=1)
        tasks = [asyncio.ensure_future(batcher.submit(runs, image(i), 1)) for i in range(4)]
        await one.entered(1)
        await other.entered(1)  # while the first is still busy
        closing = asyncio.ensure_future(batcher.close())
        one.gate.set()
        other.gate.set()
        answers = [value(answer) for answer in await asyncio.gather(*tasks)]
        await closing
        return answers

    assert asyncio.run(main()) == [0, 1, 2, 3]
    assert sorted([*one.batches, *other.batches]) == [([i], 1) for i in range(4)]


def test_free_lanes_share_the_queue_and_batches_know_if_they_are_alone() -> None:
    device = Device()
    runs = (device, device)

    async def main() -> None:
        batcher = Batcher(lanes=2, max_batch=8)

        async def submit(*values: int) -> None:
            await asyncio.gather(*(batcher.submit(runs, image(v), 1) for v in values))

        first = asyncio.ensure_future(submit(0, 1))
        await device.entered(2)
        rest = asyncio.ensure_future(submit(2, 3, 4, 5, 6))  # wait until both lanes are free
        device.gate.set()
        await asyncio.gather(first, rest)
        await submit(7)
        await batcher.close()

    asyncio.run(main())
    assert sorted(values for values, _ in device.batches[:2]) == [[0], [1]]
    assert sorted(v for values, _ in device.batches for v in values) == list(range(8))
    assert device.alone[0] and not device.alone[1]  # the first batch started alone
    assert device.alone[7]
