"""What a run folder tells, read for a report: nothing is written, nothing in it is run.

A run may be finished, running or stopped, its last line torn, its numbers not finite: all of that
is read as far as it goes, and `Run.notes` says what was left out.
"""

import fcntl
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from fastssl import checkpoint, demo, journal, order
from fastssl.config import RecipeError

# Files that only a run folder has; the lock alone is a run that has not begun to train.
_MARKS = ("recipe.yaml", "metrics.jsonl", "backbone.json", "environment.json", ".lock")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    name: str  # the folder's; with parents where two are alike
    folder: Path
    state: str  # "done", "running", "stopped" or "nothing yet"
    step: int  # optimizer steps done, by the log
    planned: int | None  # optimizer steps of the whole run; None: no checkpoint tells yet
    images: int | None  # usable ones of the data
    recipe: dict[str, dict[str, Any]]  # as run; empty where recipe.yaml can't be read
    starts: list[dict[str, Any]]  # environment.json
    lines: list[dict[str, Any]]  # of metrics.jsonl, those of training, by step
    probes: list[dict[str, Any]]  # of metrics.jsonl, those of probes, as written
    notes: list[str] = field(default_factory=list)  # what could not be read

    def option(self, section: str, key: str) -> Any:
        """A value of the recipe; None where it has none."""
        return self.recipe.get(section, {}).get(key)

    @property
    def progress(self) -> str:
        """In words: "done, 160 steps", "stopped at step 40 of 160"."""
        if self.state == "nothing yet":
            return "nothing yet: no step is logged"
        if self.state == "done":
            return f"done, {self.step:,} steps"
        whole = "" if self.planned is None else f" of {self.planned:,}"
        epochs = self.option("train", "epochs")
        epoch = [line["epoch"] for line in self.lines[-1:] if isinstance(line.get("epoch"), int)]
        there = f" (epoch {epoch[0] + 1} of {epochs})" if epoch and epochs else ""
        return f"{self.state} at step {self.step:,}{whole}{there}"

    @property
    def task(self) -> str:
        """The graph, and the objective where it is called otherwise."""
        graph, objective = (self.part(section) for section in ("pipeline", "objective"))
        return " + ".join(dict.fromkeys(name for name in (graph, objective) if name)) or "unknown"

    @property
    def backbone(self) -> str:
        """The module and what makes the network small or large: "resnet10, width 32"."""
        name = str(self.option("backbone", "name") or self.part("backbone") or "unknown")
        for key in ("widening", "width"):  # a widening given has a width that is the default
            value = self.option("backbone", key)
            if value is not None:
                return f"{name}, {key} {value}"
        return name

    @property
    def data(self) -> str:
        """Where the images are from, and how many."""
        root = self.option("data", "root")
        if root is None:
            return "unknown"
        built_in = Path(str(root)) == demo.folder() / "train"
        count = "" if self.images is None else f"{self.images:,} images, "
        return f"{count}built-in" if built_in else f"{count}{root}"

    @property
    def learns_classes(self) -> bool:
        """Its accuracy in training is that of the folder's classes, not of a pretext task."""
        measured = any(line["probe"] == "val" for line in self.probes)
        return measured or (self.folder / "head.safetensors").exists()

    def part(self, section: str) -> str | None:
        """The last word of the module that a section names."""
        use = self.option(section, "use")
        return None if use is None else str(use).rpartition(".")[2]


def read_all(paths: list[str]) -> list[Run]:
    """The runs in `paths`, each under a name of its own.

    Raises:
        RecipeError: a path is no run folder, or is given twice.
    """
    folders = [Path(path).resolve() for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        _refuse_other(path, folder)
        if folders.count(folder) > 1:
            raise RecipeError(f"{path} is given twice: name every run folder once")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _refuse_other(path: str, folder: Path) -> None:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise RecipeError(f"{path} {found}: name a run folder, as train.out was")
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    if not any(each.name in _MARKS for each in inside):
        runs = [each.name for each in inside if (each / "recipe.yaml").exists()]
        hint = "name a run folder, as train.out was"
        if runs:
            more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
            hint = f"it holds run folders: name those ({', '.join(runs[:3])}{more})"
        raise RecipeError(f"{path} is no run folder (it has no recipe.yaml): {hint}")


def _names(folders: list[Path]) -> list[str]:
    """As many of the last parts of each path as tell it from the others."""
    parts = 1
    while True:
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names) or parts > max(len(f.parts) for f in folders):
            return names
        parts += 1


def _read(folder: Path, name: str) -> Run:
    notes: list[str] = []
    recipe = _recipe(folder, notes)
    lines, probes = _journal(folder, notes)
    saved = _fingerprint(folder, notes)
    images, planned = saved.get("usable images"), None
    options = recipe.get("train", {})
    if images is not None and isinstance(options.get("epochs"), int):
        world = saved["processes"]
        planned = options["epochs"] * order.steps_per_epoch(
            images, world, saved["train.batch"] // world
        )
        planned = min(planned, options.get("steps") or planned)
    step = max((line["step"] for line in lines), default=0)
    if (folder / "backbone.json").exists():
        state = "done"
    elif not lines and not probes:
        state = "nothing yet"
    else:
        state = "running" if _is_locked(folder) else "stopped"
    return Run(
        name=name,
        folder=folder,
        state=state,
        step=step,
        planned=planned,
        images=images,
        recipe=recipe,
        starts=_starts(folder, notes),
        lines=lines,
        probes=probes,
        notes=notes,
    )


def _journal(folder: Path, notes: list[str]) -> tuple[list[dict], list[dict]]:
    """The lines of training, by step, and those of probes, as written."""
    lines, damaged = journal.read_and_count(folder)
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
        count = len(lines) + len(damaged)
        notes.append(
            f"metrics.jsonl: {len(damaged)} of {count} lines are torn or damaged and left out"
            f" (line {some})"
        )
    training = [line for line in lines if "probe" not in line]
    probes = [line for line in lines if "probe" in line]
    return sorted(training, key=lambda line: line["step"]), probes


def _recipe(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("recipe.yaml is not there: nothing is known of the recipe")
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(keys, dict) for keys in values.values()):
        notes.append("recipe.yaml is damaged: nothing is known of the recipe")
        return {}
    return {str(s): {str(k): v for k, v in keys.items()} for s, keys in values.items()}


def _starts(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        starts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("environment.json is not there: nothing is known of machine and versions")
        return []
    except (OSError, ValueError, RecursionError):
        starts = None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        notes.append("environment.json is damaged: nothing is known of machine and versions")
        return []
    return starts


def _fingerprint(folder: Path, notes: list[str]) -> dict[str, Any]:
    """What the newest checkpoint says of data and processes; mapped, so its tensors stay unread."""
    path = checkpoint.latest(folder / "checkpoints")
    if path is None:
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = state["fingerprint"]
        return {key: int(found[key]) for key in ("usable images", "processes", "train.batch")}
    # PyTorch raises RuntimeError for a torn zip file; the rest is a file of something else.
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        notes.append(
            f"checkpoints/{path.name} can't be read: how many steps are planned is unknown"
        )
        return {}


def _is_locked(folder: Path) -> bool:
    """Whether a run on this machine is at work there; a run elsewhere may not be seen."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go as the file is closed
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
