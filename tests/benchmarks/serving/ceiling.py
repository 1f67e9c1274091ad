"""The ceiling: decoding and inference in one process without HTTP, with camcal's decoder, threads and batches.

Run as a process of its own: `python -m tests.benchmarks.serving.ceiling BUNDLE PHOTOS SECONDS` prints JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from camcal.cpus import usable_cpus
from camcal.models.bundle import OUTPUTS, Bundle
from camcal.service.engine.decoding import Limits, decode

MAX_BATCH = 32
TOP_K = 5
LIMITS = Limits(max_bytes=20_000_000, max_pixels=50_000_000)

Run = Callable[[list[NDArray[np.uint8]]], object]


class Ceiling(TypedDict):
    """Images per second of each way to use the cores, and of the best; and one image's time on the whole machine."""

    best: float
    pipelined: float  # decode threads feed batches of 32, each run on all cores
    parallel: float  # each core decodes and runs single images by itself
    parallel_batches: float  # the same with batches of 8
    decode_ms: float
    inference_ms: float
    decode_inference_ms: float


class Work:
    """The bundle and the photographs."""

    def __init__(self, bundle: Path, photos: Path):
        self.bundle = Bundle.load(bundle)
        self.photos = [path.read_bytes() for path in sorted(photos.glob("*.jpg"))]

    def decode(self, number: int) -> NDArray[np.uint8]:
        """The network's input of a photograph, counted round and round."""
        photo = self.photos[number % len(self.photos)]
        return decode(photo, self.bundle.manifest.preprocessing, LIMITS, picture=False).pixels

    def session(self, threads: int) -> Run:
        """What runs the graph for a list of images, with all outputs as camcal asks for them."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(self.bundle.model_path), options, providers=["CPUExecutionProvider"])
        top_k = np.array(min(TOP_K, len(self.bundle.manifest.classes)), dtype=np.int64)
        return lambda images: session.run(list(OUTPUTS), {"images": np.stack(images), "top_k": top_k})


def pipelined(work: Work, seconds: float) -> float:
    """Images per second."""
    run, done = work.session(usable_cpus()), 0
    with ThreadPoolExecutor(usable_cpus()) as pool:
        waiting = deque(pool.submit(work.decode, number) for number in range(2 * MAX_BATCH))
        run([waiting.popleft().result() for _ in range(MAX_BATCH)])
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            waiting.extend(pool.submit(work.decode, done + number) for number in range(MAX_BATCH))
            run([waiting.popleft().result() for _ in range(MAX_BATCH)])
            done += MAX_BATCH
        elapsed = time.perf_counter() - began
        pool.shutdown(cancel_futures=True)
    return done / elapsed


def parallel(work: Work, seconds: float, batch: int) -> float:
    """Images per second."""
    counts = [0] * usable_cpus()
    runs = [work.session(1) for _ in counts]
    began = time.perf_counter()

    def loop(core: int) -> None:
        while time.perf_counter() - began < seconds:
            runs[core]([work.decode(counts[core] + number) for number in range(batch)])
            counts[core] += batch

    threads = [threading.Thread(target=loop, args=(core,)) for core in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def alone(work: Work, seconds: float) -> tuple[float, float, float]:
    """Medians for one image at a time, in ms: decoding, inference on all cores, and both together."""
    run = work.session(usable_cpus())
    times: list[tuple[float, float]] = []
    run([work.decode(0)])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        image = work.decode(len(times))
        decoded = time.perf_counter()
        run([image])
        times.append((decoded - began, time.perf_counter() - decoded))
    array = 1000 * np.array(times)
    return float(np.median(array[:, 0])), float(np.median(array[:, 1])), float(np.median(array.sum(axis=1)))


def measure(bundle: Path, photos: Path, seconds: float) -> Ceiling:
    """Every way for `seconds` each."""
    work = Work(bundle, photos)
    rates = pipelined(work, seconds), parallel(work, seconds, 1), parallel(work, seconds, 8)
    decode_ms, inference_ms, both_ms = alone(work, seconds)
    return Ceiling(
        best=max(rates),
        pipelined=rates[0],
        parallel=rates[1],
        parallel_batches=rates[2],
        decode_ms=decode_ms,
        inference_ms=inference_ms,
        decode_inference_ms=both_ms,
    )


if __name__ == "__main__":
    json.dump(measure(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])), sys.stdout)
