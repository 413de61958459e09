"""A grid of runs of one recipe, one after the other, each a process of its own; and its results.

Every point is checked before the first one trains. A point that fails does not end the sweep, and
one that is finished is not run again: the same command goes on where it stopped.
"""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from fastssl import checkpoint, config, journal, launcher, stopping
from fastssl.config import Recipe, RecipeError
from fastssl.recipe_text import in_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
# What a launcher tells its processes is not for those that are started here.
_LAUNCHER = ("ACCELERATE_", "MASTER_", "PET_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE")
_LAUNCHER += ("GROUP_", "ROLE_")
# Keys in which two runs of one recipe may differ. A run that is over has the steps that it has.
FREE = config.FREE_ON_RESUME - {"train.steps"}
_REMEMBERED = 1000  # lines of what a process says: torchrun adds many to the one that matters
_REST = 10  # seconds for the last lines of a process that has ended


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    values: tuple[Any, ...]  # of the keys, in their order
    seed: int
    name: str  # of its folder: patch_weight=0.5,seed=1
    folder: Path
    overrides: tuple[str, ...]  # all of its command line behind the recipe
    recipe: Recipe


@dataclass(frozen=True)
class Wish:
    """One run of the grid, as yet unchecked."""

    recipe: str  # its path
    overrides: tuple[str, ...]  # of the command line, for all runs
    given: dict[str, Any]  # dotted key -> value, of this one
    name: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a point; accuracies 0 ... 1."""

    point: Point
    failed: str | None  # why; None: finished
    accuracy: float | None = None  # of the probe
    random: float | None = None  # of the probe on the network before its first step
    pretext: float | None = None  # of the task itself, in its last line


def plan(
    recipe: str,
    overrides: Sequence[str],
    keys: dict[str, tuple[Any, ...]],
    seeds: Sequence[int],
    out: Path,
) -> list[Point]:
    """All points, those of the first seed first, so that a part of a sweep is a curve already.

    Args:
        recipe: path of the recipe.
        overrides: section.key=value, for all points.
        keys: dotted key -> its values.
        seeds: train.seed of each repetition; empty: the recipe's own.
        out: folder of the run folders.

    Raises:
        RecipeError: a key or a value is wrong for the recipe; every mistake, one a line.
    """
    wishes = []
    for seed, values in itertools.product(seeds or [None], itertools.product(*keys.values())):
        given = dict(zip(keys, values, strict=True))
        if seed is not None:
            given["train.seed"] = seed
        name = ",".join(f"{key.rpartition('.')[2]}={_in_name(v)}" for key, v in given.items())
        wishes.append(Wish(recipe, tuple(overrides), given, name, values))
    return points_of(wishes, out, remedy="sweep.out=...")


def points_of(wishes: Sequence[Wish], out: Path, *, remedy: str) -> list[Point]:
    """The wishes, checked.

    Args:
        wishes: in the order in which they are to run.
        out: folder of the run folders.
        remedy: what names another such folder on the command line.

    Raises:
        RecipeError: a key or a value is wrong for a recipe; every mistake, one a line. Or two runs
            would share a folder, or one holds a finished run of another recipe.
    """
    points: list[Point] = []
    mistakes: list[str] = []
    for wish in wishes:
        own = [f"{key}={in_yaml(_plain(value))}" for key, value in wish.given.items()]
        line = (*wish.overrides, *own, f"train.out={in_yaml(str(out / wish.name))}")
        try:
            loaded = config.load(wish.recipe, line)
        except RecipeError as error:
            mistakes += str(error).splitlines()
            continue
        seed = loaded.train.seed
        points.append(Point(wish.values, seed, wish.name, out / wish.name, line, loaded))
    if mistakes:
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))
    names = [point.name for point in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RecipeError(f"two points would share a folder: {', '.join(sorted(twice))}")
    for point in points:
        _refuse_other(point, remedy)
    return points


def is_finished(point: Point) -> bool:
    """Whether its run folder holds a whole run."""
    return (point.folder / "backbone.json").exists()


def recipe_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The `values` of the recipe in a run folder.

    Raises:
        RecipeError: the folder has none, or it can't be read.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        raise RecipeError(f"{folder} holds a finished run without its recipe.yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    sections = {"backbone", "objective", "pipeline", "train"}
    if (
        not isinstance(values, dict)
        or not sections <= values.keys()
        or not all(isinstance(keys, dict) for keys in values.values())
    ):
        raise RecipeError(f"{path} is not the recipe of a run")
    return values


class Runner:
    """Starts processes one after the other and passes a wish to stop on to the one that runs."""

    def __init__(self) -> None:
        """Nothing runs, nobody has asked."""
        self.stopped = False
        self._process: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM become a wish; the running process writes its checkpoint first."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(
        self, module: str, arguments: Sequence[str], *, processes: int, log: Path | None = None
    ) -> tuple[int, str]:
        """The exit code of `python -m module arguments`, and the last line it said was wrong.

        What it says goes to the file `log`, or where this process's own words go, as it says it.
        """
        launch = ["-m", module, *arguments]
        if processes > 1:
            launch = [*launcher.torchrun(processes), *launch]
        last: deque[str] = deque(maxlen=_REMEMBERED)
        with contextlib.ExitStack() as until_the_end:
            file = None
            if log is not None:
                file = log.open("w+", encoding="utf-8", errors="replace")
                until_the_end.enter_context(file)
            process = subprocess.Popen(
                [sys.executable, *launch],
                env=_environment(),
                stdout=file,
                stderr=subprocess.PIPE if file is None else file,
                encoding="utf-8",
                errors="replace",
            )
            self._process = process
            if self.stopped:  # asked while it was being started
                process.send_signal(signal.SIGTERM)
            if process.stderr is not None:
                # A thread: a process that outlives its parent may keep the pipe open.
                listener = threading.Thread(
                    target=_pass_on, args=(process.stderr, last), daemon=True
                )
                listener.start()
                code = process.wait()
                listener.join(_REST)
            else:
                code = process.wait()
            self._process = None
            if file is not None:
                file.seek(0)
                last.extend(file)
        lines = [line.strip() for line in last if line.strip()]
        said = [line for line in lines if line.startswith("error")] or lines[-1:]
        if self.stopped:
            code = stopping.STOPPED
        return code, said[-1] if said else ""

    def _ask(self, number: int, _: object) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def train(point: Point, runner: Runner, *, processes: int) -> tuple[int, str]:
    """Runs or goes on with the point; the exit code of train.py and what it said was wrong.

    0 also where another command has finished the same run in the meantime, which train.py refuses.
    """
    arguments = [point.recipe.path, *point.overrides]
    code, said = runner.run("fastssl.train", arguments, processes=processes)
    if code and not runner.stopped and is_finished(point) and _unlike(point) is None:
        return 0, ""
    return code, said


def knn(point: Point) -> tuple[float | None, float | None]:
    """The kNN accuracy that the run itself measured last, and the one before its first step."""
    lines = [
        line
        for line in journal.read(point.folder)
        # Those that `evaluate.py knn` added name a stage.
        if line.get("probe") == "knn" and "stage" not in line
    ]
    first = _finite(lines[0]["accuracy"]) if lines and lines[0]["step"] == 0 else None
    return (_finite(lines[-1]["accuracy"]) if lines else None), first


def pretext(point: Point) -> float | None:
    """The accuracy of the task in the last line of the run; None for a task without one."""
    lines = [line for line in journal.read(point.folder) if "loss" in line]
    return _finite(lines[-1].get("accuracy")) if lines else None


def measured(out: Path) -> dict[str, float]:
    """Fingerprint -> the accuracy that a sweep in `out` has measured; sweep.json keeps them."""
    path = out / "sweep.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known.get("measured", {})


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the standard deviation of the sample (n - 1); None of too few."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def by_values(outcomes: Sequence[Outcome]) -> dict[tuple[Any, ...], list[Outcome]]:
    """The repetitions of each point of the grid, in the grid's order."""
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.point.values, []).append(outcome)
    return groups


def write_runs(out: Path, keys: Sequence[str], outcomes: Sequence[Outcome], about: dict) -> None:
    """One line a run, as sweep.csv and, with what it was, sweep.json."""
    rows = [
        {
            **dict(zip(keys, map(_plain, outcome.point.values), strict=True)),
            "seed": outcome.point.seed,
            "state": "failed" if outcome.failed is not None else "finished",
            "accuracy": outcome.accuracy,
            "random": outcome.random,
            "pretext_accuracy": outcome.pretext,
            "run": str(outcome.point.folder),
            "reason": outcome.failed,
        }
        for outcome in outcomes
    ]
    out.mkdir(parents=True, exist_ok=True)
    with checkpoint.whole_file(out / "sweep.json") as file:
        file.write(json.dumps({**about, "runs": rows}, indent=1).encode())
    part = out / ".sweep.csv.tmp"
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        table.writeheader()
        table.writerows(rows)
    part.replace(out / "sweep.csv")


def _refuse_other(point: Point, remedy: str) -> None:
    """A finished run of the same name must be the run that would be made.

    Raises:
        RecipeError: it is another: says what differs.
    """
    why = _unlike(point) if is_finished(point) else None
    if why is not None:
        raise RecipeError(f"{why}: name another folder ({remedy})")


def _unlike(point: Point) -> str | None:
    """Why the finished run in the point's folder is not that of the point; None: it is."""
    here = point.recipe.values
    try:
        there = recipe_of(point.folder)
    except RecipeError as error:
        return str(error)
    unlike = config.differences(there, here, FREE, unsaid=config.defaults(here))
    if not unlike:
        return None
    return f"{point.folder} holds a finished run of another recipe ({told(unlike)})"


def told(differences: Sequence[str]) -> str:
    """The first of what config.differences found."""
    return "; ".join(differences[:3]) + " ..." * (len(differences) > 3)


def _pass_on(source: IO[str], last: deque[str]) -> None:
    """Says what a process says, and remembers its last lines."""
    with source:
        for line in source:
            last.append(line)
            # Without a terminal to say it on, training goes on.
            with contextlib.suppress(OSError):
                sys.stderr.write(line)
                sys.stderr.flush()


def _finite(accuracy: float | None) -> float | None:
    """NaN is no accuracy, and JSON has no word for it."""
    return accuracy if accuracy is not None and math.isfinite(accuracy) else None


def _environment() -> dict[str, str]:
    """For a process of its own, which is to end with this one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER) or name == "ACCELERATE_USE_CPU"
    }
    paths = [str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # As accelerate launch would say: train.py then asks Linux for a signal when its parent dies.
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_DYNAMO_BACKEND": "no"}


def _in_name(value: Any) -> str:
    text = in_yaml(_plain(value)).replace("[", "").replace("]", "").replace(", ", "-")
    return re.sub(r"[^\w.+-]+", "_", text)


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
