"""What stands between camcal and its device: `python -m tests.benchmarks.serving.device --device cuda`.

Images a second of a ResNet-50 at 224×224: of ONNX Runtime alone, of camcal's session, its queue and its decoder, and of
the whole service with and without decoding, so that one sees which of them is the next to hold up the rest.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import numpy as np
import onnxruntime as ort
import torch
import typer
from numpy.typing import NDArray

from camcal.cpus import usable_cpus
from camcal.models.bundle import OUTPUTS, Bundle
from camcal.service.engine.batching import Batcher
from camcal.service.engine.decoding import decode
from camcal.service.engine.session import CPU, CUDA, Session
from camcal.service.settings import Device
from camcal.training.provenance import commit, hardware
from tests.benchmarks.serving import photos
from tests.benchmarks.serving.__main__ import RESULTS
from tests.benchmarks.serving.bundles import random_weights
from tests.benchmarks.serving.ceiling import LIMITS, TOP_K
from tests.benchmarks.serving.load import Load
from tests.benchmarks.serving.rounds import SKIP_S, generate
from tests.benchmarks.serving.servers import SERVERS, Running, Server, running
from tests.benchmarks.serving.summary import closed_loop

TENSOR_OUTPUT = "calibrated_probabilities"

Result = dict[str, Any]


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    precision: Annotated[str, typer.Option(help="Of the network: fp32 or fp16.")] = "fp16",
    backbone: Annotated[str, typer.Option(help="The network.")] = "resnet50",
    batches: Annotated[str, typer.Option(help="Sizes of batches.")] = "1,2,4,8,16,32,64",
    clients: Annotated[int, typer.Option(help="Of the service, in a closed loop.")] = 128,
    workers: Annotated[str, typer.Option(help="Processes of the service, one measurement each.")] = "1,4,8",
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 3.0,
    out: Annotated[Path, typer.Option(help="Folder for device.json and device.md.")] = RESULTS,
) -> None:
    """Write device.json and device.md."""
    if device not in ("cuda", "cpu") or precision not in ("fp32", "fp16"):
        raise typer.BadParameter("expected --device cuda or cpu, and --precision fp32 or fp16")
    sizes = [int(size) for size in batches.split(",")]
    results: Result = {"commit": commit(), "hardware": hardware(torch.device(device)), "cpus": usable_cpus()}
    results |= {"device": device, "backbone": backbone, "clients": clients}
    with TemporaryDirectory() as work:
        folder = Path(work)
        bundle = Bundle.load(random_weights(folder / "bundle", backbone, precision))  # type: ignore[arg-type]  # checked
        results["precision"] = bundle.manifest.precision
        results |= measure(bundle, cast(Device, device), sizes, seconds)
        photos.write_photos(folder / "photos")
        results["decode"] = decoding(bundle, folder / "photos", seconds)
        write_tensors(bundle, folder / "photos", folder / "tensors")
        results["service"] = [
            served(bundle, folder, device, int(count), clients, seconds) for count in workers.split(",")
        ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "device.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "device.md").write_text(markdown(results))
    print(markdown(results))


def measure(bundle: Bundle, device: Device, sizes: list[int], seconds: float) -> Result:
    """Images per second of ONNX Runtime and of camcal's session for each size of batch, and of camcal's queue."""
    session = Session(bundle, device=device, max_batch=max(sizes))
    session.warm_up()
    size = bundle.manifest.preprocessing.input_size
    images = np.random.default_rng(0).integers(0, 256, (max(sizes), size, size, 3), dtype=np.uint8)
    alone, resident = onnxruntime(bundle, device)
    curve: list[Result] = []
    for count in sizes:
        batch = images[:count]
        curve.append(
            {
                "batch": count,
                "onnxruntime": count * rate(lambda batch=batch: alone(batch), seconds),  # type: ignore[misc]
                "resident": count * rate(resident(batch), seconds),
                "camcal": count * rate(lambda batch=batch: session.run(batch, TOP_K), seconds),  # type: ignore[misc]
            }
        )
    return {"curve": curve, "queue": asyncio.run(queue(session, images[0], seconds)), "lanes": session.lanes}


def rate(work: Callable[[], object], seconds: float) -> float:
    """How often `work` is done in a second, after three times that do not count."""
    for _ in range(3):
        work()
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or not done:
        work()
        done += 1
    return done / max(elapsed, 1e-9)


def onnxruntime(
    bundle: Bundle, device: Device
) -> tuple[Callable[[NDArray[np.uint8]], object], Callable[[NDArray[np.uint8]], Callable[[], object]]]:
    """ONNX Runtime as its documentation shows it: from NumPy to NumPy, and with images and outputs on the device."""
    if device == "cuda":
        ort.preload_dlls()
    provider, place = (CUDA, "cuda") if device == "cuda" else (CPU, "cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = ort.InferenceSession(str(bundle.model_path), options, providers=[provider])
    top_k = np.array(TOP_K, dtype=np.int64)

    def resident(images: NDArray[np.uint8]) -> Callable[[], object]:
        binding = session.io_binding()
        binding.bind_ortvalue_input("images", ort.OrtValue.ortvalue_from_numpy(images, place, 0))
        binding.bind_cpu_input("top_k", top_k)
        for name in OUTPUTS:
            binding.bind_output(name, place)
        return lambda: session.run_with_iobinding(binding)

    return lambda images: session.run(list(OUTPUTS), {"images": images, "top_k": top_k}), resident


async def queue(session: Session, image: NDArray[np.uint8], seconds: float) -> float:
    """Images per second through camcal's batcher, asked for by four full batches of callers at once."""
    batcher = Batcher(lanes=session.lanes, max_batch=session.max_batch)
    runs, done = [session.run] * session.lanes, 0
    began = time.perf_counter()

    async def ask() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await batcher.submit(runs, image, TOP_K)
            done += 1

    await asyncio.gather(*(ask() for _ in range(4 * session.max_batch)))
    elapsed = time.perf_counter() - began
    await batcher.close()
    return done / elapsed


def decoding(bundle: Bundle, folder: Path, seconds: float) -> float:
    """Photographs per second that all CPUs decode, with the picture that a heatmap needs."""
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    counts = [0] * usable_cpus()
    end = time.perf_counter() + seconds

    def work(thread: int) -> None:
        while time.perf_counter() < end:
            decode(files[counts[thread] % len(files)], bundle.manifest.preprocessing, LIMITS)
            counts[thread] += 1

    with ThreadPoolExecutor(len(counts)) as threads:
        list(threads.map(work, range(len(counts))))
    return sum(counts) / seconds


def write_tensors(bundle: Bundle, source: Path, target: Path) -> None:
    """The photographs as bodies of the Open Inference Protocol, already decoded."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        pixels = decode(path.read_bytes(), bundle.manifest.preprocessing, LIMITS, picture=False).pixels
        (target / path.name).write_bytes(tensor_head(pixels.shape) + pixels.tobytes())


def tensor_head(shape: tuple[int, ...]) -> bytes:
    """What stands before the pixels of one image."""
    size = {"binary_data_size": int(np.prod(shape))}
    described = {"name": "images", "shape": [1, *shape], "datatype": "UINT8", "parameters": size}
    wanted = {"name": TENSOR_OUTPUT, "parameters": {"binary_data": True}}
    return json.dumps({"inputs": [described], "outputs": [wanted]}).encode()


def served(bundle: Bundle, folder: Path, device: str, workers: int, clients: int, seconds: float) -> Result:
    """Images per second over HTTP: photographs to `/predict`, and pixels to `/v2`, which need no decoding."""
    server = Server(
        name=f"camcal-{workers}",
        command=lambda *place: [*SERVERS["camcal-1"].command(*place), "--device", device, "--workers", str(workers)],
    )
    photo = next((folder / "photos").iterdir()).read_bytes()
    size = bundle.manifest.preprocessing.input_size
    head = f"Inference-Header-Content-Length: {len(tensor_head((size, size, 3)))}\r\n"
    with running(server, Path(sys.executable).parent, bundle.path, photo, folder / "service.log") as up:

        def ask(path: str, files: str, headers: str = "") -> float:
            load = {"path": path, "photos": folder / files, "headers": headers, "clients": clients}
            return _answered(up, load, seconds)

        ask("/predict", "photos")  # to warm up
        return {
            "workers": workers,
            "memory_mb": up.memory_mb(),
            "photographs": ask("/predict", "photos"),
            "pixels": ask(f"/v2/models/{bundle.manifest.name}/infer", "tensors", head),
        }


def _answered(server: Running, load: Result, seconds: float) -> float:
    """Answers per second. Raises RuntimeError if any request failed."""
    outcome = generate(Load(port=server.port, seconds=seconds + SKIP_S, **load))
    figures = closed_loop(outcome.records, SKIP_S, seconds)
    if figures["errors"]:
        raise RuntimeError(f"{load['path']} was answered with {figures['errors']}")
    return figures["rate"]


def markdown(results: Result) -> str:
    """The figures as a page."""
    curve = results["curve"]
    title = f"{results['backbone']} at 224², {results['precision']}, random weights"
    options = f"--device {results['device']} --precision {results['precision']}"
    best = max(row["camcal"] for row in curve)
    lines = [
        f"# camcal and its device: {title}",
        "",
        f"{results['hardware']}, {results['cpus']} CPUs; images per second. Made by",
        f"`python -m tests.benchmarks.serving.device {options}`; more in [device.json](device.json).",
        "",
        "| batch | ONNX Runtime, all stays on the device | ONNX Runtime | camcal's session | of ONNX Runtime |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['batch']} | {row['resident']:.0f} | {row['onnxruntime']:.0f} | {row['camcal']:.0f} | "
            f"{row['camcal'] / row['onnxruntime']:.0%} |"
            for row in curve
        ),
        "",
        f"| {results['clients']} clients, photographs of 57 KB | images/s | of camcal's session |",
        "| --- | ---: | ---: |",
        f"| the queue alone | {results['queue']:.0f} | {results['queue'] / best:.0%} |",
        f"| decoding alone, all CPUs | {results['decode']:.0f} | {results['decode'] / best:.0%} |",
    ]
    for entry in results["service"]:
        name = f"over HTTP, {entry['workers']} worker{'s' * (entry['workers'] > 1)}"
        for kind, words in (("pixels", "pixels, nothing to decode"), ("photographs", "photographs")):
            lines.append(f"| {name}, {words} | {entry[kind]:.0f} | {entry[kind] / best:.0%} |")
    return "\n".join([*lines, "", bottleneck(results, best), ""])


def bottleneck(results: Result, best: float) -> str:
    """A sentence on what holds up the rest: the device, if what feeds it keeps up with nine tenths of its `best`."""
    parts = {
        "decoding": results["decode"],
        "HTTP, and what Python does for each request": max(entry["pixels"] for entry in results["service"]),
    }
    slowest = min(parts, key=lambda name: parts[name])
    if parts[slowest] >= 0.9 * best:
        parts[slowest := "the device"] = best
    photographs = max(entry["photographs"] for entry in results["service"])
    return (
        f"Photographs come through at {photographs:.0f} a second. What holds them up is {slowest}, which makes "
        f"{parts[slowest]:.0f} a second without the rest."
    )


if __name__ == "__main__":
    typer.run(main)
