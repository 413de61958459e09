"""FFCV at our tasks, in a process and an environment of its own, asked for batches one by one.

FFCV 1.0.2, its last release, comes as source that is compiled against OpenCV. Built on Debian 12
with Python 3.11, beside fastssl's environment:

    apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev
    python3 -m venv ffcv-env
    ffcv-env/bin/pip install 'numpy<2.3' numba opencv-python-headless torch pillow tqdm
    ffcv-env/bin/pip install 'setuptools<81' wheel
    ffcv-env/bin/pip install ffcv==1.0.2 --no-build-isolation --no-deps
    python -m benchmarks tasks --ffcv-python ffcv-env/bin/python ...

(--no-deps, or pip takes opencv-python, which wants a display, and pytorch-pfn-extras, which
nothing here calls. It says 0.0.3rc1 of itself; its metadata say 1.0.2.)

What is compared: FFCV gets the very bytes of the JPEG files, or the raw pixels that they decode to,
in a .beton file that is written first and lies in the page cache. It decodes each image whole, by
libjpeg-turbo in its fast DCT, crops as torchvision's RandomResizedCrop, resizes by OpenCV's
INTER_AREA, and gives uint8 in HWC order, as fastssl does. It makes `queue` batches ahead and then
stops: between its turns it was measured to use no CPU. It works on the CPU alone: its loader would
only copy finished batches to a GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines import rotation, single_view

GRAPHS = ("pipelines.single_view", "pipelines.rotation")
WORKER = Path(__file__).with_name("ffcv_worker.py")
AHEAD = 3  # batches, FFCV's default


class Unavailable(Exception):
    """FFCV is not there, or not for this task; the message is one line and says what to do."""


@dataclass(frozen=True)
class Worker:
    """FFCV's process, which has made its first batch."""

    process: subprocess.Popen[str]
    file: Path  # the .beton
    log: IO[bytes]  # what it wrote to stderr
    graph: str
    version: str  # FFCV's
    size: int  # of the .beton, bytes
    queue: int = AHEAD + 1  # batches made ahead: those that wait, and the one to come behind them

    def run(self) -> int:
        """Has one batch made; the number of its images.

        Raises:
            RuntimeError: the process has ended.
        """
        return self._ask("run")

    def sample_batch(self) -> dict[str, Tensor]:
        """A batch by the names of the graph's outputs, as fastssl.loader.Loader gives it."""
        with tempfile.TemporaryDirectory(dir=self.file.parent) as folder:
            path = os.path.join(folder, "batch.npz")
            self._ask(f"sample {path}")
            with np.load(path) as saved:
                image = torch.from_numpy(saved["image"]).movedim(-1, -3)
                index = torch.from_numpy(saved["index"])
        if self.graph == "pipelines.single_view":
            return {"image": image, "index": index}
        label = torch.arange(4).repeat(len(index), 1)
        return {"turned": image, "angle": 90 * label, "label": label, "index": index}

    def close(self) -> None:
        """Ends the process and removes the .beton; may be called twice."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None  # both are pipes
        self.process.kill()  # it has nothing to save
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()
        self.file.unlink(missing_ok=True)

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None  # both are pipes
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"FFCV's process has ended: {_last_line(self.log)}")
        return int(answer)


def start(
    paths: Sequence[str],
    *,
    graph: str,
    options: Any,
    form: Literal["jpeg", "raw"],
    batch: int,
    threads: int,
    folder: Path,
    python: str | None = None,
    seed: int = 0,
) -> Worker:
    """Writes the images for FFCV, starts it and waits for a first batch: half a minute or so.

    Args:
        paths: image files; their position is the `index` of a batch. Every epoch is shuffled; with
            as many images as `batch`, each is in every batch once.
        graph: the task, one of GRAPHS.
        options: an instance of the graph's Options.
        form: jpeg: the bytes of the files; what FFCV would not decode as others do (no JPEG, turned
            by EXIF, CMYK) is encoded by FFCV at quality 90. raw: pixels.
        batch: images.
        threads: FFCV's num_workers.
        folder: where the .beton is written; three bytes a pixel if raw.
        python: an interpreter that has ffcv; None: this one.
        seed: of the order. Crops and flips draw from numba's generators, which FFCV does not seed.

    Raises:
        Unavailable: FFCV is not installed there, fails at the start, or can't do `graph`.
        ValueError: there is no such interpreter, or an option asks for what FFCV can't do.
    """
    task = _task(graph, options)
    found = interpreter(python)
    handle, name = tempfile.mkstemp(suffix=".beton", dir=folder)
    os.close(handle)
    file = Path(name)
    log = tempfile.TemporaryFile()  # noqa: SIM115  it is the worker's, who closes it
    process = subprocess.Popen(
        [found, "-I", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ
        | {
            "CUDA_VISIBLE_DEVICES": "",  # it would make CUDA streams and events for every batch
            "NUMBA_NUM_THREADS": str(threads),  # no more can be asked for later
        },
    )
    assert process.stdin is not None
    assert process.stdout is not None  # both are pipes
    asked = {
        "paths": [os.path.abspath(path) for path in paths],
        "file": name,
        "form": "raw" if form == "raw" else "jpg",
        "batch": batch,
        "threads": threads,
        "ahead": AHEAD,
        "seed": seed,
        **task,
    }
    worker = Worker(process, file, log, graph, "", 0)
    try:
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        said = json.loads(process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        process.wait()
        reason = _last_line(log)
        worker.close()
        raise Unavailable(f"FFCV ({found}) does not start: {reason}") from None
    except BaseException:  # Ctrl-C: leave neither the process nor the file behind
        worker.close()
        raise
    return Worker(process, file, log, graph, said["version"], said["bytes"])


def interpreter(python: str | None) -> str:
    """The interpreter `python`, or None: this one, if it has ffcv.

    Raises:
        Unavailable: it has not.
        ValueError: it is none.
    """
    remedy = "benchmarks/plain/ffcv.py says how to build it; then --ffcv-python PATH"
    if python is None:
        if find_spec("ffcv") is None:
            raise Unavailable(f"FFCV is not installed: {remedy}")
        return sys.executable
    looked = "import importlib.util, sys; sys.exit(3 if importlib.util.find_spec('ffcv') else 4)"
    try:
        code = subprocess.run([python, "-I", "-c", looked], capture_output=True).returncode
    except OSError as error:
        raise ValueError(f"--ffcv-python: can't run {python}: {error.strerror}") from None
    if code not in (3, 4):
        raise ValueError(f"--ffcv-python: {python} is no Python interpreter")
    if code == 4:
        raise Unavailable(f"FFCV is not installed for {python}: {remedy}")
    return python


def _task(graph: str, options: Any) -> dict[str, Any]:
    """What the worker is told of the graph and its options."""
    if graph not in GRAPHS:
        raise Unavailable(
            f"FFCV has no operators for {graph}: it has one random crop of an image, flip, "
            f"brightness, contrast and saturation, which is enough for {' and '.join(GRAPHS)}"
        )
    if graph == "pipelines.single_view":
        assert isinstance(options, single_view.Options)
        aspect = options.image_aspect
    else:
        assert isinstance(options, rotation.Options)
        aspect = options.aspect
        _refuse(crop=(options.crop, "inception"), copies=(options.copies, "all"))
        _refuse(turns=(options.turns, (0, 90, 180, 270)))
    _refuse(hue=(options.hue, 0.0), grayscale=(options.grayscale, 0.0))
    return {
        "size": options.image_size,
        "area": options.image_area,
        "aspect": aspect,
        "flip": options.flip,
        "brightness": options.brightness,
        "contrast": options.contrast,
        "saturation": options.saturation,
        "turns": graph == "pipelines.rotation",
    }


def _refuse(**wanted: tuple[Any, Any]) -> None:
    """Each option's value and the only one that FFCV's operators can give."""
    for name, (value, possible) in wanted.items():
        if value != possible:
            raise ValueError(
                f"FFCV has no operator for {name} ({value!r}): it must be {possible!r}"
            )


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"
