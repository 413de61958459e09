"""A grid of runs of one recipe, one after the other, each a process of its own; and its results.

Every point is checked before the first one trains. A point that fails does not end the sweep, and
one that is finished is not run again: the same command goes on where it stopped.
"""

import contextlib
import csv
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastssl import checkpoint, config, journal, stopping
from fastssl.config import Recipe, RecipeError
from fastssl.recipe_text import in_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
# What a launcher tells its processes is not for those that are started here.
_LAUNCHER = ("ACCELERATE_", "MASTER_", "PET_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE")
_LAUNCHER += ("GROUP_", "ROLE_")


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


class Runner:
    """Starts processes one after the other and passes a wish to stop on to the one that runs."""

    def __init__(self) -> None:
        """Nothing runs, nobody has asked."""
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None

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

        What it says goes to the file `log`, or where this process's own words go.
        """
        launch = ["-m", module, *arguments]
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            launch = [*torchrun, f"--nproc_per_node={processes}", *launch]
        with tempfile.TemporaryFile() if log is None else log.open("w+b") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *launch],
                env=_environment(),
                stdout=None if log is None else errors,
                stderr=errors,
            )
            if self.stopped:  # asked while it was being started
                self._process.send_signal(signal.SIGTERM)
            code = self._process.wait()
            self._process = None
            errors.seek(0)
            text = errors.read().decode(errors="replace")
        if log is None:
            sys.stderr.write(text)
            sys.stderr.flush()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("error")] or lines[-1:]
        if self.stopped:
            code = stopping.STOPPED
        return code, said[-1] if said else ""

    def _ask(self, number: int, _: object) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def train(point: Point, runner: Runner, *, processes: int) -> tuple[int, str]:
    """Runs or goes on with the point; the exit code of train.py and what it said was wrong."""
    return runner.run("fastssl.train", [point.recipe.path, *point.overrides], processes=processes)


def knn(point: Point) -> tuple[float | None, float | None]:
    """The kNN accuracy that the run itself measured last, and the one before its first step."""
    lines = [
        line
        for line in journal.read(point.folder)
        # Those that `evaluate.py knn` added name a stage.
        if line.get("probe") == "knn" and "stage" not in line
    ]
    first = lines[0]["accuracy"] if lines and lines[0]["step"] == 0 else None
    return (lines[-1]["accuracy"] if lines else None), first


def pretext(point: Point) -> float | None:
    """The accuracy of the task in the last line of the run; None for a task without one."""
    lines = [line for line in journal.read(point.folder) if "loss" in line]
    return lines[-1].get("accuracy") if lines else None


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
    if not is_finished(point):
        return
    text = (point.folder / "recipe.yaml").read_text(encoding="utf-8")
    # A run that is over has the steps that it has.
    free = config.FREE_ON_RESUME - {"train.steps"}
    here = point.recipe.values
    unlike = config.differences(yaml.safe_load(text), here, free, unsaid=config.defaults(here))
    if unlike:
        raise RecipeError(
            f"{point.folder} holds a finished run of another recipe ({'; '.join(unlike[:3])}"
            f"{' ...' * (len(unlike) > 3)}): name another folder ({remedy})"
        )


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
