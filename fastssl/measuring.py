"""What a sweep or a grid asks of its finished runs: a command of evaluate.py each, and its number.

A command is a process of its own, as a user would start it. Its mistakes are found before the first
run trains, hours ahead.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastssl import demo, features, journal, labelled, probe, starting, sweeping
from fastssl.config import RecipeError
from fastssl.evaluations import knn
from fastssl.linear import protocols
from fastssl.recipe_check import check, make, schema_of_settings
from fastssl.recipe_text import in_yaml, read_overrides
from fastssl.sweeping import Point, Runner


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The section `evaluate` as far as it is passed on; its folder is the run's."""

    seed: int | None = None  # of the random network; null: train.seed of each run
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


# Sections that are a command's, and not the recipe's.
SECTIONS = {
    "linear": protocols.Options,
    "knn": knn.Options,
    "features": features.Options,
    "evaluate": EvaluateOptions,
}


def check_arguments(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is to be passed on must be right, though it is used only after hours of training.

    Returns:
        Section -> key -> value, of all SECTIONS and all their keys, with the defaults.

    Raises:
        RecipeError: all mistakes, one a line.
    """
    errors: list[str] = []
    made: dict[str, Any] = {}
    entries = read_overrides(arguments, SECTIONS, errors)
    for section, options in SECTIONS.items():
        schema = schema_of_settings(section, options)
        values = check(entries[section], schema, errors)
        made[section] = make("command line", section, schema, entries[section], values, errors)
    if errors:
        raise RecipeError("\n".join(errors))
    return {section: asdict(options) for section, options in made.items()}


def classes(point: Point) -> int:
    """How many classes a probe of the point tells apart; renders the built-in images for a demo.

    Raises:
        RecipeError: there is nothing to probe on, or nothing to train on where that is still to do.
    """
    recipe = point.recipe
    if recipe.demo:
        demo.render(say=starting.say)
    root = probe.folder_of(recipe.probe, recipe.data.options)
    if root is None or not sweeping.is_finished(point):
        _refuse_absent(recipe.path, "data.root", recipe.data.options.root)
    if root is None:
        raise RecipeError(
            f"{recipe.path}: accuracies are to be compared: give probe.root, a folder with "
            "train/<class>/ and val/<class>/"
        )
    # Of training's images a subset may be asked for: it is not the probe's.
    data = labelled.whole(recipe.data.options, str(root))
    if recipe.probe.root is None:
        where = str(recipe.path)
    else:
        where = f"{recipe.path}: probe.root ({root})"
        _refuse_absent(recipe.path, "probe.root", root)
    try:
        _, _, found = labelled.splits(
            recipe.data.module, data, cache=demo.cache(), say=starting.silent
        )
    except ValueError as error:
        what = str(error).removeprefix("data.root: ")  # of the reader, which knows no other key
        raise RecipeError(f"{where}: {what}") from error
    return len(found)


def _refuse_absent(recipe: str | Path, key: str, root: str) -> None:
    if not labelled.is_url(root) and not Path(root).expanduser().exists():
        raise RecipeError(f"{recipe}: {key}: there is no {root}")


def data_arguments(point: Point) -> list[str]:
    """What a command is told of the images to probe on; of the built-in ones nothing."""
    if point.recipe.demo:
        return []
    root = probe.folder_of(point.recipe.probe, point.recipe.data.options)
    return [f"data.use={point.recipe.data.use}", f"data.root={in_yaml(str(root))}"]


def accuracy(
    what: str, run: str, folder: Path, arguments: Sequence[str], runner: Runner
) -> tuple[float | None, str]:
    """The accuracy (0 ... 1) of a RUN's last stage by a command, and what was wrong.

    Args:
        what: linear or knn.
        run: the RUN.
        folder: that whose metrics.jsonl the command adds its lines to.
        arguments: of the command, behind the RUN.
        runner: starts it.
    """
    before = len(_lines(what, folder))
    code, said = runner.run("fastssl.evaluate", [what, run, *arguments], processes=1)
    if code:
        return None, f"evaluate.py {what} ended with {code}: {said}"
    lines = _lines(what, folder)[before:]
    if not lines:
        return None, f"evaluate.py {what} wrote no accuracy to {folder / 'metrics.jsonl'}"
    found = lines[-1].get("accuracy")
    if not isinstance(found, int | float) or not math.isfinite(found):
        return None, f"evaluate.py {what} found an accuracy of {found}"
    return found, ""


def _lines(what: str, folder: Path) -> list[dict]:
    """Those of the command; the kNN accuracies that training itself measures name no stage."""
    return [line for line in journal.read(folder) if line.get("probe") == what and "stage" in line]


def weights(folder: Path) -> str:
    """SHA-256 of a finished run's backbone.json: its weights' own is in it, and their recipe."""
    return hashlib.sha256((folder / "backbone.json").read_bytes()).hexdigest()


def fingerprint(of: Any) -> str:
    """Of plain types: the name of a measurement, of all that it depends on."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def usage(section: str, options: Any) -> list[str]:
    """A line for each key of the section, with its default."""
    lines = []
    for each in fields(options):
        plain = list(each.default) if isinstance(each.default, tuple) else each.default
        default = "(needed)" if each.default is MISSING else in_yaml(plain)
        lines.append(f"  {section}.{each.name}={default}")
    return lines
