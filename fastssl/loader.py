"""One process's batches of channels-last tensors: the seam between DALI and torch.

A `Loader` is endless and counts steps. What it gives at a step is a function of the file list, the
order plan, the seed and the files that turned out undecodable on the way: `state()` and `resume()`
continue it bit for bit, random augmentations included. It is never given to `Accelerator.prepare`,
which would pass it through without a word (it knows torch DataLoaders only).

What a recipe may set of it is the section `loader`, Options below: how many threads, how far ahead,
and by which means images are decoded. `python -m benchmarks tune RECIPE` measures what is best on a
machine.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from fastssl import machine

# Batches between two in-memory DALI checkpoints: what is run again when a file can't be decoded.
REPLAY = 64
WITNESSES = 8  # images from elsewhere that are tried where a whole batch can't be decoded
MOST = 1024  # threads, and batches made ahead: more is a slip of the finger


class DataError(ValueError):
    """The images can't be read any more; the message is all that the user needs."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one process makes its batches; nothing of it changes what is learnt.

    `decoder` and `region` give other pixels of the same distribution, so that a run which is
    resumed keeps them. `threads` and `prefetch` give the same batches at another speed, and so do
    the room set aside for a GPU's decoder and, as far as its units agree to the last bit,
    `hw_decoder_load`.
    """

    threads: int | None = None  # of DALI, a process; null: cores allowed / processes on the machine
    prefetch: int = 2  # batches made ahead: more even out images of uneven cost, and take memory
    decoder: Literal["auto", "cpu"] = "auto"  # auto: the GPU decodes where there is one; cpu: the
    # threads do, and pixels travel in place of bytes: for a GPU that training keeps busy
    hw_decoder_load: float = 0.65  # part of the images that the GPU's JPEG engines take, where it
    # has any (A100, H100, ...); its other units and the threads do the rest
    # Decode no more of an image than its crop needs, where a graph has one crop.
    region: bool = True
    # What a GPU's decoder sets aside before the first batch. An image that needs more makes it ask
    # for memory in the middle of the work. `python -m fastssl.data check FOLDER` tells what the
    # images of a data set need; these are what DALI takes anyway. Nothing here counts on a CPU.
    decoder_width: int = 0  # pixels: of the widest image; with decoder_height for the JPEG engines,
    decoder_height: int = 0  # of the highest image; 0 and 0: they ask when they see one
    decoder_device_mib: int = 16  # MiB of the GPU's memory, for each of `threads`
    decoder_host_mib: int = 8  # MiB of pinned memory, twice for each of `threads`

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value, and what to give.
        """
        if self.threads is not None and not 1 <= self.threads <= MOST:
            raise ValueError(
                f"threads ({self.threads}) must be in 1 ... {MOST}, or null for a share of the"
                " cores"
            )
        if not 1 <= self.prefetch <= MOST:
            raise ValueError(f"prefetch ({self.prefetch}) must be in 1 ... {MOST}")
        if self.decoder not in ("auto", "cpu"):
            raise ValueError(f"decoder ({self.decoder!r}) must be auto or cpu")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load ({self.hw_decoder_load}) must be in 0 ... 1")
        for name, side in (("width", self.decoder_width), ("height", self.decoder_height)):
            if not 0 <= side <= 65_535:  # a JPEG's greatest
                raise ValueError(f"decoder_{name} ({side}) must be in 0 ... 65535 pixels")
        if (self.decoder_width == 0) != (self.decoder_height == 0):
            raise ValueError(
                f"decoder_width ({self.decoder_width}) and decoder_height ({self.decoder_height})"
                " go together: give both, or 0 and 0"
            )
        for name, room in (("device", self.decoder_device_mib), ("host", self.decoder_host_mib)):
            if not 0 <= room <= 2047:  # DALI counts the bytes in 32 bits
                raise ValueError(f"decoder_{name}_mib ({room}) must be in 0 ... 2047 MiB")


class Loader:
    """Endless batches of one process.

    Attributes:
        step: batches given so far.
        skipped: rows that failed to decode, with the file and the reason, in the order found.
    """

    def __init__(
        self,
        reader: ModuleType,
        samples: Any,
        graph: ModuleType,
        options: Any,
        rows: Callable[[int], np.ndarray],
        *,
        batch: int,
        seed: int,
        device: torch.device,
        loading: Options,
        say: Callable[[str], None] = print,
    ) -> None:
        """Nothing is read before the first batch.

        Args:
            reader: the module of `samples` (pipelines/readers/*).
            samples: the listing.
            graph: a graph file (pipelines/*).
            options: the graph's.
            rows: the order plan: the listing's rows of a step, int64 [batch].
            batch: images a step of this process.
            seed: of the augmentations; must differ between processes.
            device: where tensors are wanted; a CUDA device runs the graph on it.
            loading: the recipe's section `loader`; without threads, all cores allowed are taken.
            say: told about files that can't be decoded.
        """
        self.step = 0
        self.skipped: dict[int, str] = {}
        self._reader, self._samples, self._rows = reader, samples, rows
        self._graph, self._options = graph, options
        self._batch, self._seed, self._device = batch, seed, device
        self._loading, self._say = loading, say
        self._pipeline: Pipeline | None = None
        self._names: list[str] = []
        self._first = 0  # the step at which the random stream of the augmentations begins
        self._saved: tuple[int, bytes | None] = (0, None)  # a step and DALI's state after it
        self._at = 0  # the batch that the pipeline is to make next, or was making when it failed
        self._unexplained: int | None = None  # the last one that failed for no file's fault
        self._wait = _Wait(device)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Itself: the position is kept."""
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch by output name.

        Images are uint8 [B, 3, H, W] and patches uint8 [B, F, 3, h, w], both views of HWC memory;
        labels int64 [B, ...]; an index int64 [B].

        Raises:
            DataError: none of a batch's files can be read, and none of WITNESSES others.
        """
        with self._wait:
            while True:
                try:
                    outputs = self._running().run(self._stream())
                    break
                except RuntimeError as error:
                    self._skip_undecodable(error)
            tensors = {
                name: _tensor(output) for name, output in zip(self._names, outputs, strict=True)
            }
        self.step += 1
        if self.step - self._saved[0] >= REPLAY:
            self._saved = (self.step, self._running().checkpoint())
        return tensors

    def data_wait(self) -> float:
        """Seconds that the training device waited for data since this was last asked.

        On a GPU, the time between the end of the work before a batch and the moment the batch was
        ready, by CUDA events that are read long after they passed: nothing stalls.
        """
        return self._wait.seconds()

    def state(self) -> dict[str, Any]:
        """All that `resume` needs, as plain types and tensors."""
        saved = self._saved
        if self._pipeline is not None and self.step != saved[0]:
            saved = (self.step, self._pipeline.checkpoint())
        dali = b"" if saved[1] is None else saved[1]
        return {
            "step": self.step,
            "first": self._first,
            "dali": torch.frombuffer(bytearray(dali), dtype=torch.uint8) if dali else None,
            "skipped": dict(self.skipped),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on as the loader that gave `state`, which must have had the same arguments."""
        self.step = state["step"]
        self._first = state.get("first", 0)  # what was saved before there was such a thing
        self.skipped = dict(state["skipped"])
        dali = state["dali"]
        self._saved = (self.step, None if dali is None else dali.numpy().tobytes())
        self._pipeline = None

    def begin(self, step: int, skipped: dict[int, str]) -> None:
        """Goes on at `step` with new random augmentations, a function of the seed and the step.

        For a start with another number of processes, where no state of before fits.

        Args:
            step: batches to be taken as given.
            skipped: rows that failed to decode, of all processes.
        """
        self.resume({"step": step, "first": step, "dali": None, "skipped": skipped})

    def close(self) -> None:
        """Ends DALI's threads and frees its memory; the next batch, if any, starts them anew.

        Without it that is left to Python's search for cycles, which a pipeline is full of.
        """
        if self._pipeline is not None:
            self._saved = (self.step, self._pipeline.checkpoint())
            self._pipeline = None
            gc.collect()

    def _running(self) -> Pipeline:
        """The pipeline, standing behind batch number `step`."""
        if self._pipeline is None:
            step, dali = self._saved
            self._names, self._pipeline = self._build(
                self._rows_or_others, self._batch, dali, self._loading
            )
            for given in range(step, self.step):  # at most REPLAY batches
                self._at = given
                self._pipeline.run()  # fails if a file has gone since it was given
        self._at = self.step
        return self._pipeline

    def _build(
        self,
        rows: Callable[[int], np.ndarray],
        batch: int,
        dali: bytes | None,
        loading: Options,
    ) -> tuple[list[str], Pipeline]:
        # DALI counts batches from the beginning of its random stream.
        first = self._first

        def planned(batch: int) -> np.ndarray:
            return rows(first + batch)

        pipeline = Pipeline(
            batch_size=batch,
            num_threads=loading.threads or threads_per_process(1),
            device_id=_dali_device(self._device),  # pyright: ignore[reportArgumentType]  None: no GPU
            seed=self._seed if first == 0 else seed_of(self._seed, first),
            prefetch_queue_depth=loading.prefetch,
            enable_checkpointing=True,
            checkpoint=dali,
        )
        backend = "cpu" if self._device.type == "cpu" else "gpu"
        with pipeline:
            image, index = self._reader.source(self._samples, planned, loading)
            outputs = self._graph.graph(image, index, self._options, backend)
            # Labels travel with the pixels: a copy from here would be one more wait for the GPU.
            here = [node.gpu() if backend == "gpu" else node for node in outputs.values()]
            pipeline.set_outputs(*here)
        pipeline.build()
        return list(outputs), pipeline

    def _stream(self) -> "torch.cuda.Stream | None":
        """DALI orders its outputs on this stream without the host waiting for them."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def _rows_or_others(self, step: int) -> np.ndarray:
        """The plan's rows of a step; for an undecodable one, the next usable in the listing."""
        rows = self._rows(step)
        if not self.skipped:
            return rows
        return np.array([self._in_place_of(int(row)) for row in rows], np.int64)

    def _in_place_of(self, row: int) -> int:
        usable = self._samples.usable
        position = int(np.searchsorted(usable, row))
        for step in range(len(usable)):
            other = int(usable[(position + step) % len(usable)])
            if other not in self.skipped:
                return other
        raise DataError(f"{self._samples.root}: not one of {len(usable)} images can be decoded")

    def _skip_undecodable(self, error: RuntimeError) -> None:
        """Finds the files at fault, puts them on the skip list and lets the pipeline be built anew.

        DALI says for only some failures which file it was, and a pipeline that failed is dead: the
        batch is halved, through the same graph, until each file at fault stands alone. The error
        comes with the very batch that holds them, whatever was made ahead.
        """
        self._pipeline = None
        rows = list(dict.fromkeys(self._rows_or_others(self._at).tolist()))
        found = self._failures(rows)
        if len(found) == len(rows):  # these files, or whatever there is?
            self._refuse_outage(rows, found[rows[0]], error)
            found = self._failures(rows)  # the disk may have come back in between
        if not found:
            # A network disk that failed for a moment; or no file's fault: a defect of the graph,
            # or the device's memory.
            if self._unexplained == self._at:
                raise error
            self._unexplained = self._at
            return
        for row, reason in found.items():
            path = self._samples.path(row)
            self.skipped[row] = f"{path}: {reason}"
            self._say(f"data: skipping {path} from now on: can't be decoded ({reason})")

    def _refuse_outage(self, rows: list[int], reason: str, error: RuntimeError) -> None:
        """Looks for an image that can be decoded, where none of `rows` can.

        Raises:
            DataError: there is none among a few of those that are left, from all over the listing.
        """
        left = np.setdiff1d(self._samples.usable, [*self.skipped, *rows], assume_unique=True)
        few = np.linspace(0, len(left) - 1, min(WITNESSES, len(left)), dtype=np.int64)
        if all(self._failures([int(row)]) for row in left[few]):
            raise DataError(
                f"{self._samples.path(rows[0])}: can't be decoded ({reason}), and neither can any"
                f" of {len(rows) - 1 + len(few)} other files that were tried: is"
                f" {self._samples.root} still there and readable?"
            ) from error

    def _failures(self, rows: list[int]) -> dict[int, str]:
        """The rows among `rows` that the graph can't be run on, with the reason in a line.

        A graph that can't even be built is no file's fault: that error goes on its way.
        """
        # Whole images: of a damaged place that one random crop meets, another sees nothing.
        whole = replace(self._loading, region=False)
        _, pipeline = self._build(lambda _: np.array(rows, np.int64), len(rows), None, whole)
        try:
            pipeline.run()
        except RuntimeError as error:
            if len(rows) == 1:
                return {rows[0]: _reason(str(error))}
            middle = len(rows) // 2
            return self._failures(rows[:middle]) | self._failures(rows[middle:])
        return {}


def output_names(reader: ModuleType, samples: Any, graph: ModuleType, options: Any) -> list[str]:
    """The names that a graph puts out, without reading a file or touching a device."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)  # pyright: ignore[reportArgumentType]  None: no GPU
    with pipeline:
        image, index = reader.source(samples, lambda step: np.zeros(1, np.int64), Options())
        return list(graph.graph(image, index, options, "cpu"))


def threads_per_process(processes_here: int) -> int:
    """The cores that this process may use, divided by the processes on this machine, at least 1."""
    return max(1, int(machine.cores_allowed()) // max(1, processes_here))


def seed_of(*numbers: int) -> int:
    """A seed of its own for each tuple of numbers, in the 31 bits that DALI takes."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


class _Wait:
    """Adds up the time spent waiting for batches."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._seconds = 0.0
        self._began = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._cuda:
            self._before = torch.cuda.Event(enable_timing=True)
            self._before.record(torch.cuda.current_stream(self._device))
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            after = torch.cuda.Event(enable_timing=True)
            after.record(torch.cuda.current_stream(self._device))
            self._events.append((self._before, after))
        else:
            self._seconds += time.perf_counter() - self._began

    def seconds(self) -> float:
        while self._events and self._events[0][1].query():  # the rest counts next time
            before, after = self._events.popleft()
            self._seconds += before.elapsed_time(after) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _dali_device(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _tensor(output: Any) -> Tensor:
    """A DALI batch as a torch tensor over the same memory; ...HWC becomes ...CHW by view."""
    tensor = torch.from_dlpack(output.as_tensor())
    if output.layout().endswith("HWC"):
        return tensor.movedim(-1, -3)
    return tensor.squeeze(1) if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor


def _reason(message: str) -> str:
    """The telling line of a DALI error: they come with a header and a stack."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [x for x in lines if "ail" in x and "Critical error" not in x and "thread" not in x]
    return (telling or lines or ["no reason given"])[0][:200]
