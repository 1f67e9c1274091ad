"""Run a bundle's graph with ONNX Runtime: a batch of images in, named arrays out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from camcal.cpus import usable_cpus
from camcal.models import answers
from camcal.models.bundle import INPUTS, OUTPUTS, Bundle, BundleError
from camcal.service.settings import Device, Settings

log = logging.getLogger("camcal")

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
MAX_LANES = 4  # maximum number of concurrent batches on the CPU
SPIN_US = "50"  # how long threads spin while they wait for work, if their batch runs alone


class DeviceError(ValueError):
    """The requested device is not available."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The graph's outputs for N images, K classes, k top classes and maps of h×w positions.

    `top_classes` are the classes with the k highest calibrated logits, in descending order. `maps` are their plain
    contribution maps; the sum of a map over its positions is the class's entry of `logits`.
    """

    logits: NDArray[np.float32]  # N×K
    calibrated_logits: NDArray[np.float32]  # N×K
    probabilities: NDArray[np.float32]  # N×K
    calibrated_probabilities: NDArray[np.float32]  # N×K
    top_classes: NDArray[np.int64]  # N×k
    maps: NDArray[np.float32]  # N×k×h×w

    def faults(self) -> dict[int, str]:
        """The rows with invalid outputs, and the reason for each."""
        return answers.faults(vars(self))


ImageBatch = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]  # N of H×W×3, or one N×H×W×3
RunBatch = Callable[[ImageBatch, int, bool], Outputs]  # images, top_k, alone; see `Session.run`


class Session:
    """One model on one device.

    `lanes` threads may call `run` at the same time: one on a GPU, up to four on the CPU. On the CPU, a batch that runs
    alone uses all threads, which gives one client the lowest latency. Concurrent batches use few threads each. These
    spend less time waiting for each other at every layer, which gives a higher throughput.

    Args:
        bundle: the bundle to run.
        device: the device to run it on.
        threads: CPU threads of a batch that runs alone; by default one per usable CPU.
        max_batch: maximum batch size. By default 32 on a GPU and 8 on the CPU, where larger batches take more memory
            but no less time per image.
        gpu: index of the GPU.
        pad: whether to pad batches to a few sizes. By default on a GPU, where each new size costs time.

    Raises:
        BundleError: if the graph's inputs, outputs, classes or grid do not match the manifest.
        DeviceError: if `device` is `cuda` and CUDA is not available.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "auto",
        threads: int | None = None,
        max_batch: int | None = None,
        gpu: int = 0,
        pad: bool | None = None,
    ):
        self.bundle = bundle
        threads = threads or usable_cpus()
        model = bundle.read_model()
        self._session, self.fallback = _open(bundle, model, device, threads, gpu)
        self.provider: str = self._session.get_providers()[0]
        on_cpu = self.provider == CPU
        self.threads = threads
        self._pad = not on_cpu if pad is None else pad
        self.lanes = min(threads, MAX_LANES) if on_cpu and not self._pad else 1
        self._narrow = self._session
        if self.lanes > 1:
            self._narrow = _create(bundle, model, threads // self.lanes, [CPU], alone=False)
        self.max_batch = max_batch = max_batch or (8 if on_cpu else 32)
        powers = (1 << power for power in range(max_batch.bit_length()))
        self._buckets: list[int] = sorted({*(powers if self._pad else range(1, max_batch)), max_batch})
        size = bundle.manifest.preprocessing.input_size
        self._input = np.zeros((max_batch, size, size, 3), dtype=np.uint8)  # input buffer for padded batches
        self._check_names()
        place = ("cpu", 0) if on_cpu else ("cuda", gpu)
        padded = self._buckets if self._pad else []
        self._bound = {count: _Bound(self._session, (count, size, size, 3), place) for count in padded}
        self._check_shapes()

    def buckets(self) -> list[int]:
        """The batch sizes in use: 1, 2, 4, … and `max_batch` with padding, else all up to `max_batch`."""
        return self._buckets

    def bucket(self, count: int) -> int:
        """The smallest batch size in use for `count` images."""
        return next(size for size in self._buckets if size >= count)

    def warm_up(self) -> None:
        """Run each padded batch size once, or the smallest and the largest batch, so that no request is slow."""
        lanes = self.lanes if self.lanes > 1 else 0
        with ThreadPoolExecutor(self.lanes) as threads:
            for size in self._buckets if self._pad else (1, self.max_batch):
                batch = self._input[:size]
                self.run(batch, 1)
                # All lanes at once, so that memory reaches its peak before the first request.
                list(threads.map(self.run, [batch] * lanes, [1] * lanes, [False] * lanes))

    def prove(self) -> None:
        """Raises BundleError if the outputs on test images are invalid, or differ from those recorded in the bundle."""
        for alone in (True, False) if self.lanes > 1 else (True,):
            answers.prove(
                lambda images, top_k, alone=alone: vars(self.run(images, top_k, alone)),  # type: ignore[misc]
                self.bundle.manifest,
                self.bundle.canary,
            )

    def run(self, images: ImageBatch, top_k: int, alone: bool = True) -> Outputs:
        """Run N images (uint8, H×W×3 each, N ≤ `max_batch`), with maps for the `top_k` top classes.

        Args:
            alone: whether no other batch is running. It affects the speed only, not the outputs.
        """
        count = len(images)
        if self._pad:
            for row, image in enumerate(images):
                self._input[row] = image
            # The padding is left over from earlier batches: images of a batch do not influence each other.
            bucket = self.bucket(count)
            arrays = self._bound[bucket].run(self._input[:bucket], top_k)
        else:
            session = self._session if alone else self._narrow
            inputs = {"images": np.asarray(images), "top_k": np.array(top_k, dtype=np.int64)}
            arrays = session.run(list(OUTPUTS), inputs)
        return Outputs(**{name: array[:count] for name, array in zip(OUTPUTS, arrays, strict=True)})

    def _check_names(self) -> None:
        inputs = {node.name for node in self._session.get_inputs()}
        outputs = {node.name for node in self._session.get_outputs()}
        if inputs != set(INPUTS) or not outputs.issuperset(OUTPUTS):
            raise BundleError(
                f"the graph takes {sorted(inputs)} and returns {sorted(outputs)}; "
                f"expected {sorted(INPUTS)} and {sorted(OUTPUTS)}"
            )

    def _check_shapes(self) -> None:
        manifest = self.bundle.manifest
        size, classes = manifest.preprocessing.input_size, len(manifest.classes)
        top_k = min(2, classes)
        try:
            result = self.run(np.zeros((1, size, size, 3), dtype=np.uint8), top_k)
        except Exception as error:  # ONNX Runtime raises its own classes, which share no public base
            raise BundleError(f"the graph does not take images of {size}×{size} px: {error}") from None
        for name, array in vars(result).items():
            expected = {"top_classes": (1, top_k), "maps": (1, top_k, *manifest.grid)}.get(name, (1, classes))
            if array.shape != expected:
                raise BundleError(f"the graph's output {name} has shape {array.shape}; the manifest says {expected}")


class _Bound:
    """An input buffer on the device for one batch size, so that no batch has to allocate one."""

    def __init__(self, session: ort.InferenceSession, shape: tuple[int, ...], place: tuple[str, int]):
        self._session = session
        self._images = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, *place)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("images", self._images)

    def run(self, images: NDArray[np.uint8], top_k: int) -> list[NDArray[Any]]:
        """Run a full batch. The outputs are copies, owned by the caller."""
        self._images.update_inplace(images)
        self._binding.bind_cpu_input("top_k", np.array(top_k, dtype=np.int64))
        for name in OUTPUTS:  # rebound because their shapes depend on top_k
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        arrays: list[NDArray[Any]] = self._binding.copy_outputs_to_cpu()
        return arrays


def load_sessions(settings: Settings, *, digest: str | None = None) -> list[Session]:
    """Verify, load, warm up and check the bundle of `settings`, once for each of `settings.sessions`.

    With a graph that never ends, this call never returns. A server therefore tests the bundle in a separate process
    first, see `camcal.service.engine.proofs`.

    Args:
        settings: the settings of the server.
        digest: the expected checksum of the manifest; any by default.

    Raises:
        BundleError: if the bundle is invalid, gives wrong outputs, or changed while it was loaded.
        DeviceError: if the device is not available.
    """
    bundle = Bundle.load(settings.bundle, max_model_bytes=settings.max_model_bytes, digest=digest)
    threads = settings.intra_threads or max(1, usable_cpus() // settings.sessions)
    sessions = [
        Session(bundle, device=settings.device, threads=threads, max_batch=settings.max_batch, gpu=gpu)
        for gpu in range(settings.sessions)
    ]
    for session in sessions:
        session.warm_up()
        session.prove()
    bundle.verify_unchanged()
    return sessions


def load_session(settings: Settings) -> Session:
    """The first of `load_sessions`."""
    return load_sessions(settings.model_copy(update={"sessions": 1}))[0]


def _open(
    bundle: Bundle, model: bytes, device: Device, threads: int, gpu: int
) -> tuple[ort.InferenceSession, str | None]:
    """The session, and the reason if `auto` fell back to the CPU although ONNX Runtime is built for CUDA."""
    built_for_cuda = CUDA in ort.get_available_providers()
    if device == "cuda" and not built_for_cuda:
        raise DeviceError("device is cuda, but ONNX Runtime is built without CUDA: pip install 'camcal[gpu]'")
    if device == "cpu" or not built_for_cuda:
        return _create(bundle, model, threads, [CPU]), None
    ort.preload_dlls()
    # HEURISTIC: the default EXHAUSTIVE search takes about 0.6 s for each new batch size.
    # TF32 has a mantissa of 10 bits: the sums of maps would differ from their logits by more than 1e-4.
    cuda = (CUDA, {"cudnn_conv_algo_search": "HEURISTIC", "device_id": str(gpu), "use_tf32": "0"})
    session = _create(bundle, model, threads, [cuda, CPU])
    if session.get_providers()[0] == CUDA:
        return session, None
    reason = "ONNX Runtime cannot initialize CUDA: check the GPU driver and the CUDA libraries"
    if device == "cuda":
        raise DeviceError(f"device is cuda, but {reason}")
    log.warning("falling back to the CPU: %s", reason)
    return session, reason


@functools.cache
def _register_arena() -> None:
    """Share one memory arena between all CPU sessions of this process, including those of a reload."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def _create(
    bundle: Bundle, model: bytes, threads: int, providers: list[str | tuple[str, dict[str, str]]], *, alone: bool = True
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # The default is the host's CPU count: 6.6× slower in a container with a CPU limit (microsoft/onnxruntime#29510).
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # By default, ONNX Runtime's threads spin while they wait for work, and take CPU time from decoding and HTTP. With
    # 16 clients on 2 CPUs, the shipped model took 6.1 ms of CPU time per image with spinning, and 3.5 ms without. But
    # waking threads for every node makes a batch that runs alone a third slower: such a batch spins for a short time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if alone else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if providers == [CPU]:
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    try:
        # From the verified bytes: the file may be replaced at any time.
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises its own classes, which share no public base
        raise BundleError(f"ONNX Runtime cannot load {bundle.model_path.name}: {error}") from None
    session._model_bytes = b""  # free the copy that ONNX Runtime keeps only for a change of providers
    return session
