"""What a run tells: metrics.jsonl, trackers, and a progress bar (lines, where no terminal is).

Only the main process writes; on the others every call is free.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastssl import checkpoint, config, starting
from fastssl.config import Recipe

WARM_UP = 10  # steps, whose batches were made while the run was starting
WAITING = 0.2  # part of the time that the device waits for images, above which it is told why


class Journal:
    """The log of one run folder."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        recipe: Recipe,
        *,
        steps: int,
        start: int | None,
    ) -> None:
        """Opens the log, cut back to `start` (a run that was killed had written further).

        Args:
            folder: the run folder.
            accelerator: for the trackers it was given.
            recipe: what the trackers are told of the run.
            steps: of the whole run.
            start: steps done before this start; None: a fresh run.
        """
        self._accelerator, self._steps = accelerator, steps
        self._main = accelerator.is_main_process
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        accelerator.init_trackers(
            "fastssl",
            {f"{s}.{k}": str(v) for s, keys in recipe.values.items() for k, v in keys.items()},
        )
        if not self._main:
            return
        path = folder / "metrics.jsonl"
        _cut_back(path, start)
        # Unbuffered: after a full disk nothing half-written is left to be tried again at the close.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._unwritten, self._warned = "", False
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn(recipe.name),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(
                recipe.name, total=steps, completed=start or 0, state=""
            )
            self._progress.start()

    def step(self, step: int) -> None:
        """Moves the bar; cheap, for every step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """One line of metrics.jsonl, one point for the trackers, and the state of the bar."""
        if not self._main:
            return
        self._write({"step": step, **values})
        self._accelerator.log(dict(values), step=step)
        state = _state(values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, state=state)
        else:
            self._console.print(f"step {step}/{self._steps}  {state}")

    def probe(self, step: int, name: str, values: Mapping[str, float | int]) -> None:
        """A probe's line: `accuracy` and whatever else belongs to it."""
        if not self._main:
            return
        self._write({"step": step, "probe": name, **values})
        self._accelerator.log({f"{name}/{key}": v for key, v in values.items()}, step=step)

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if self._main:
            self._console.print(text)

    def close(self) -> None:
        """Ends the bar and closes the file."""
        if not self._main:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        os.close(self._file)

    def _write(self, line: Mapping[str, object]) -> None:
        """A full disk costs no run: what can't be written is written with a later line."""
        self._unwritten += json.dumps(line) + "\n"
        try:
            written = os.write(self._file, self._unwritten.encode())
        except OSError as error:
            if not self._warned:
                self.say(f"warning: metrics.jsonl can't be written: {error.strerror}")
            self._warned = True
            return
        self._unwritten = self._unwritten.encode()[written:].decode()


class WaitAdvice:
    """Whether to tell the user, once a run, which command says why the device waits for images."""

    def __init__(self, recipe: Recipe) -> None:
        """Nothing has been said yet."""
        self._recipe = recipe
        self._steps = 0
        self._said = False

    def after(self, steps: int, wait: float) -> str | None:
        """What to say after a line of the log; None: nothing.

        Args:
            steps: that the line is about. Lines that begin in the warm-up are not judged: every
                run waits for its first batches.
            wait: its data-wait, 0 ... 1.
        """
        is_warm = self._steps >= WARM_UP
        self._steps += steps
        if self._said or not is_warm or wait <= WAITING:
            return None
        self._said = True
        return (
            f"warning: {wait:.0%} of the time goes by in waiting for images. This tells what binds "
            "(and with `tune` in place of `stages`, which settings of the loader are faster):\n"
            f"{stages_command(self._recipe)}"
        )


def stages_command(recipe: Recipe) -> str:
    """The benchmark of this very recipe, with what the command line changed; to be pasted."""
    changed = [
        f"{section}.{key}={_yaml(value)}"
        for section, keys in recipe.values.items()
        for key, value in keys.items()
        if recipe.sources.get(f"{section}.{key}") == "command line"
    ]
    return shlex.join(["python", "-m", "benchmarks", "stages", recipe.path, *changed])


def write_start(
    folder: Path, recipe: Recipe, accelerator: Accelerator, resumed: Path | None
) -> None:
    """Writes recipe.yaml, and adds this start to environment.json: who trains here, on what."""
    folder.mkdir(parents=True, exist_ok=True)
    # As first run: what may differ at a later start is in `command`.
    if resumed is None or not (folder / "recipe.yaml").exists():
        with checkpoint.whole_file(folder / "recipe.yaml") as file:
            file.write(config.dump(recipe).encode())
    path = folder / "environment.json"
    starts = _former_starts(path) if path.exists() and resumed else []
    device = accelerator.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    packages = ("torch", "torchvision", "accelerate", "nvidia-dali-cuda120", "numpy")
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": sys.argv,
            "resumed": None if resumed is None else str(resumed),
            "host": platform.node(),
            "platform": platform.platform(),
            "device": gpu or platform.processor() or "cpu",
            "processes": accelerator.num_processes,
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in packages},
            **_commit(Path(__file__).resolve().parent),
        }
    )
    with checkpoint.whole_file(path) as file:
        file.write(json.dumps(starts, indent=1).encode())


def _former_starts(path: Path) -> list[dict]:
    """What environment.json holds; one that is damaged is set aside, and costs no run."""
    try:
        starts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        starts = None
    if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
        return starts
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    starting.say(f"warning: {path} is damaged: set aside as {aside.name}, a new one is begun")
    return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> dict[str, str | None]:
    """The checkout's commit and what differs from it; nothing without git or a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit and commit.strip(), "diff": commit and git("diff", "HEAD")}


def read(folder: Path) -> list[dict]:
    """The lines of a run folder's metrics.jsonl; damaged ones are left out."""
    return read_and_count(folder)[0]


def read_and_count(folder: Path) -> tuple[list[dict], list[int]]:
    """The lines of metrics.jsonl as written, and the numbers (from 1) of those left out.

    Left out is what is no object with a step: half a line (kill -9, a full disk), other bytes.
    """
    path = folder / "metrics.jsonl"
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # torn, or not UTF-8
            line = None
        if isinstance(line, dict) and _is_step(line.get("step")):
            lines.append(line)
        else:
            damaged.append(number)
    return lines, damaged


def _is_step(step: object) -> bool:
    return type(step) is int and 0 <= step < 2**53  # beyond it floats skip whole numbers


def _cut_back(path: Path, start: int | None) -> None:
    """Leaves the whole lines up to `start`, also those behind a damaged one: they were measured."""
    if not path.exists():
        return
    kept = [] if start is None else [line for line in read(path.parent) if line["step"] <= start]
    with checkpoint.whole_file(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


def _yaml(value: object) -> str:
    """In one line, as an override is written."""
    line = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return line.removesuffix("...\n").strip()


def _state(values: Mapping[str, float | int | str]) -> str:
    """The text behind the bar: loss 9.21  lr 0.03  412 images/s  data-wait 3 %  ..."""
    parts = []
    for key, value in values.items():
        match key:
            case "epoch":
                parts.append(f"epoch {value}")
            case "images_per_second":
                parts.append(f"{value:,.0f} images/s")
            case "patches_per_second":
                pass
            case "data_wait":
                parts.append(f"data-wait {100 * float(value):.0f} %")
            case _:
                parts.append(f"{key} {value:.4g}")
    return "  ".join(parts)
