"""Recipes at several widths, one run after another, and table 1 of Kolesnikov et al. 2019 of them.

    python -m fastssl.grid RECIPE [RECIPE ...] [grid.key=value ...] [section.key=value ...]

    python -m fastssl.grid recipes/revisiting/*.yaml grid.widenings=[4,8] data.root=PATH/train

Every recipe is run at every width, with and without the last ReLU where its network can be, for
every seed: a run folder each, in grid.out. A finished run is not run again, an interrupted one goes
on, and what was measured is not measured again: the same command does all of it, and the table is
of all runs in grid.out, also those of other commands, that were measured with the same settings on
the same images, however those are written; how many were not is told. Other sections hold for every
run; `linear`, `knn`, `features` and `evaluate` for the probe.

Exit codes: 0 done, 1 a run failed (the table says which), 2 a mistake, 75 stopped by a signal.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

# OpenMP's threads spin while they wait, on cores that others need. Read once, when torch is
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from fastssl import (
    config,
    grid_table,
    k19_table,
    labelled,
    measuring,
    probe,
    starting,
    stopping,
    sweeping,
)
from fastssl.config import Recipe, RecipeError
from fastssl.grid_table import About
from fastssl.recipe_check import check, make, schema_of_settings
from fastssl.recipe_text import in_yaml, read_overrides
from fastssl.sweeping import Point, Runner, Wish


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run beside the recipes as they are, and how it is judged."""

    widenings: tuple[int, ...] = ()  # K19's k, of backbone.widening; empty: each recipe's own
    last_relu: tuple[bool, ...] = ()  # of networks that have it; empty: each recipe's own
    seeds: tuple[int, ...] = ()  # of train.seed, each a repetition; empty: each recipe's own
    probe: Literal["linear", "knn"] = "linear"  # of the last stage; linear: K19's, by L-BFGS
    out: str = "runs/grid"  # folder of the run folders and the table
    processes: int = 1  # of each run: one a GPU

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        for name in ("widenings", "last_relu", "seeds"):
            given = vars(self)[name]
            if len({*given}) < len(given):
                raise ValueError(f"{name} ({in_yaml(list(given))}) has a value twice")
        if self.widenings and min(self.widenings) < 1:
            raise ValueError(
                f"widenings ({in_yaml(list(self.widenings))}) must be at least 1; K19's: 4, 8, 12, "
                "16"
            )
        if self.seeds and not 0 <= min(self.seeds) <= max(self.seeds) < 2**31:
            raise ValueError(f"seeds ({in_yaml(list(self.seeds))}) must be in 0 ... {2**31 - 1}")
        if not self.out:
            raise ValueError("out ('') must name a folder")
        if self.processes < 1:
            raise ValueError(f"processes ({self.processes}) must be at least 1")


# In the name of every measurement on built-in images: other words would have all measured again.
_BUILT_IN = "built-in images, settings of the recipes' demo sections"
# What a grid sets itself, and the key that says how.
_OWN = {
    "train.out": "grid.out",
    "train.resume": "grid.out",
    "train.seed": "grid.seeds",
    "backbone.widening": "grid.widenings",
    "backbone.last_relu": "grid.last_relu",
}
# In what the runs of a cell may differ.
_FREE = sweeping.FREE | {"train.seed"}
_STAGES = ("features.stages=", "knn.stages=")  # not for a grid: it is of the last one


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:  # before the first run; later ones write their checkpoints
        print("interrupted", file=sys.stderr)
        return 130


def run(arguments: Sequence[str]) -> int:
    """The whole command; the exit code.

    Raises:
        ValueError: a mistake, found before the first run begins.
    """
    recipes, overrides, for_probe, options = _read(arguments)
    world = starting.environment("WORLD_SIZE", 1)
    if world > 1:
        raise RecipeError(
            "a grid starts its runs itself, as this one process: leave the launcher out and give "
            f"grid.processes={world}"
        )
    out = Path(options.out)
    points = plan(recipes, overrides, options, out)
    _refuse_other_images(points)
    chance = 1 / measuring.classes(points[0])
    command = _command(options.probe, for_probe, points[0])
    images = _images(points[0])
    names = _names(options.probe, for_probe, points[0])
    if images == _BUILT_IN:
        images = "built-in images, with a recipe's demo section where it has one"
    about = About(options.probe, command, images, chance)
    _refuse_shared_cells(points, grid_table.read(out, names, say=starting.say))
    finished = sum(map(sweeping.is_finished, points))
    starting.say(f"grid: {len(points)} runs in {out}, {finished} of them finished")
    asked = {point.name for point in points}
    if others := [each for each in grid_table.otherwise(out, names) if each not in asked]:
        starting.say(
            f"grid: of the runs in {out}, {len(others)} measured otherwise (other images, or other "
            "settings of the probe) and not in this table: "
            f"{', '.join(others[:5])}{' ...' if others[5:] else ''}"
        )
    runner, failed, table = Runner(), {}, ""
    with runner.listening():
        for number, point in enumerate(points, start=1):
            why = _run(point, f"{number} of {len(points)}", runner, options, about, names)
            if runner.stopped:
                starting.say("grid: stopped; the same command goes on from there")
                return stopping.STOPPED
            if why is not None:
                starting.say(f"grid: failed: {point.name}: {why}")
                failed[point.name] = why
            table = grid_table.write(out, grid_table.read(out, names), about, failed)
    starting.say(f"\n{table}\ngrid: table.md, table.json in {out}")
    return int(bool(failed))


def plan(
    recipes: Sequence[str], overrides: Sequence[str], options: Options, out: Path
) -> list[Point]:
    """All runs, those of the first seed and width first, so that a part is a table already.

    Args:
        recipes: paths.
        overrides: section.key=value, for all of them.
        options: which runs of each.
        out: folder of the run folders.

    Raises:
        RecipeError: a value is wrong for a recipe, or widths are asked of a network that has none;
            every mistake, one a line.
    """
    loaded: dict[str, Recipe] = {}
    mistakes: list[str] = []
    for path in recipes:
        try:
            loaded[path] = config.load(path, overrides)
        except RecipeError as error:
            mistakes += str(error).splitlines()
            continue
        if options.widenings and "widening" not in _keys(loaded[path]):
            use = loaded[path].backbone.use
            mistakes.append(
                f"{path}: {use} has no widening, which grid.widenings asks for: leave the recipe "
                "or the key out"
            )
    if options.last_relu and loaded and all("last_relu" not in _keys(r) for r in loaded.values()):
        mistakes.append(
            "command line: grid.last_relu: none of the networks can do without its last ReLU: "
            "leave it out"
        )
    if mistakes:
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))
    wishes = [
        _wish(path, overrides, recipe, given)
        for seed, k in product(options.seeds or [None], options.widenings or [None])
        for path, recipe in loaded.items()
        for given in _variants(recipe, seed, k, options.last_relu)
    ]
    return sweeping.points_of(wishes, out, remedy="grid.out=...")


def _variants(
    recipe: Recipe, seed: int | None, k: int | None, last_relu: Sequence[bool]
) -> Iterator[dict[str, Any]]:
    """What one recipe is given at one seed and width: once, or with and without the ReLU."""
    given: dict[str, Any] = {}
    if seed is not None:
        given["train.seed"] = seed
    if k is not None:
        given["backbone.widening"] = k
    for each in last_relu if "last_relu" in _keys(recipe) else ():
        yield {**given, "backbone.last_relu": each}
    if not last_relu or "last_relu" not in _keys(recipe):
        yield given


def _wish(path: str, overrides: Sequence[str], recipe: Recipe, given: dict[str, Any]) -> Wish:
    """Its folder's name says what it is, whether the recipe or the command line gave it."""
    backbone = recipe.values["backbone"]
    words = [recipe.name]
    k = given.get("backbone.widening", k19_table.widening(backbone))
    if k is not None:
        words.append(f"widening={k:g}")
    if "last_relu" in backbone:
        words.append(f"last_relu={in_yaml(given.get('backbone.last_relu', backbone['last_relu']))}")
    words.append(f"seed={given.get('train.seed', recipe.train.seed)}")
    return Wish(path, tuple(overrides), given, ",".join(words))


def _run(
    point: Point,
    place: str,
    runner: Runner,
    options: Options,
    about: About,
    names: tuple[str, str],
) -> str | None:
    """Trains the point if it must be, and measures it if it must be; why that failed."""
    if not sweeping.is_finished(point):
        starting.say(f"grid: run {place}: {point.name}")
        code, reason = sweeping.train(point, runner, processes=options.processes)
        if code or not sweeping.is_finished(point):
            return f"train.py ended with {code}: {reason}"
    if grid_table.known(point.folder, names) is not None:
        return None
    starting.say(f"grid: {about.probe} {place}: {point.name}")
    accuracy, reason = measuring.accuracy(
        about.probe, str(point.folder), point.folder, about.arguments, runner
    )
    if accuracy is None:
        return reason
    grid_table.keep(point.folder, names[0], accuracy, about)
    return None


# -- the command line ---------------------------------------------------------------------------


def _read(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str], Options]:
    """The recipes, what is for every run, what is for the probe, and the section grid.

    Raises:
        RecipeError: all mistakes in the section grid or in the probe's, one a line.
    """
    recipes = [each for each in arguments if "=" not in each]
    if not recipes:
        raise RecipeError("grid: no recipe: python -m fastssl.grid recipes/revisiting/*.yaml")
    if twice := {each for each in recipes if recipes.count(each) > 1}:
        raise RecipeError(f"grid: {', '.join(sorted(twice))} is given twice: leave one out")
    own, for_probe, rest = [], [], []
    for each in arguments:
        section = each.partition("=")[0].partition(".")[0]
        if "=" in each:
            is_probe = section in measuring.SECTIONS
            (own if section == "grid" else for_probe if is_probe else rest).append(each)
    errors: list[str] = []
    entries = read_overrides(own, ("grid",), errors)["grid"]
    schema = schema_of_settings("grid", Options)
    values = check(entries, schema, errors)
    options = make("command line", "grid", schema, entries, values, errors)
    errors += [
        f"command line: {key}: a grid gives every run its own: give {_OWN[key]}"
        for key in (each.partition("=")[0] for each in rest)
        if key in _OWN
    ]
    if errors:
        raise RecipeError("\n".join(dict.fromkeys(errors)))
    other = {"linear": "knn", "knn": "linear"}[options.probe]
    if spare := [each for each in for_probe if each.startswith(f"{other}.")]:
        raise RecipeError(f"command line: {spare[0]}: is for grid.probe={other}")
    if stages := [each for each in for_probe if each.startswith(_STAGES)]:
        raise RecipeError(
            f"command line: {stages[0]}: a grid measures the last stage: leave it out (of others: "
            f"python -m fastssl.evaluate {options.probe} RUN)"
        )
    measuring.check_arguments(for_probe)
    return recipes, rest, for_probe, options


def _command(what: str, for_probe: Sequence[str], point: Point) -> tuple[str, ...]:
    """The arguments of the probe's command behind the RUN."""
    return ("features.stages=[last]", *for_probe, *measuring.data_arguments(point))


def _names(what: str, for_probe: Sequence[str], point: Point) -> tuple[str, str]:
    """Of the measurement: by its settings, however they are written; and of earlier versions."""
    command = _command(what, for_probe, point)
    made = measuring.check_arguments([each for each in command if not each.startswith("data.")])
    settings = {section: made[section] for section in (what, "features", "evaluate")}
    images = [point.recipe.data.use, _images(point)]
    before = [what, command, _images(point, as_given=True)]
    return measuring.fingerprint([what, settings, images]), measuring.fingerprint(before)


def _images(point: Point, *, as_given: bool = False) -> str:
    if point.recipe.demo:
        return _BUILT_IN
    root = point.recipe.data.options.root
    around = str(probe.folder_of(point.recipe.probe, point.recipe.data.options))
    if not as_given:
        root, around = map(_without_slash, (root, around))
    return f"trained on {root}, probed on {around}"


def _without_slash(root: str) -> str:
    """A root without what says nothing: the slash at its end, ./ before it."""
    return root.rstrip("/") if labelled.is_url(root) else str(Path(root))


def _keys(recipe: Recipe) -> set[str]:
    """Of the section backbone."""
    return {each.name for each in fields(recipe.backbone.options)}


def _refuse_other_images(points: Sequence[Point]) -> None:
    """One table is of one set of images.

    Raises:
        RecipeError: two recipes name different ones.
    """
    first = points[0]
    readers = {point.recipe.data.use: point.recipe.path for point in points}
    if len(readers) > 1:
        said = " and ".join(f"{path} reads by {use}" for use, path in readers.items())
        raise RecipeError(f"{said}: a grid has one: give data.use for all")
    for point in points:
        if _images(point) != _images(first):
            raise RecipeError(
                f"{first.recipe.path} is {_images(first)}, and {point.recipe.path} is "
                f"{_images(point)}: a grid compares networks on the same images: give data.root "
                "and probe.root for all"
            )


def _refuse_shared_cells(points: Sequence[Point], runs: Sequence[grid_table.Run]) -> None:
    """The runs of a cell are of one recipe, each of another seed: their spread is that of seeds.

    Args:
        points: of this command.
        runs: that are in the table already.

    Raises:
        RecipeError: two are of a cell, and differ in more than the seed, or not even in that.
    """
    asked = {point.name for point in points}
    here = [(point.name, point.recipe.values) for point in points]
    there = [(run.folder, run.values) for run in runs if run.folder not in asked]
    cells: dict[k19_table.Cell, list[tuple[str, dict[str, dict[str, Any]]]]] = {}
    for name, values in here:
        cells.setdefault(k19_table.cell(values), []).append((name, values))
    for name, values in there:
        # Cells that this command adds nothing to are what they were.
        cells.get(k19_table.cell(values), []).append((name, values))
    for cell, its in cells.items():
        seeds: dict[int, str] = {}
        first, first_values = its[0]
        said = config.defaults(first_values)
        for name, values in its:
            unlike = config.differences(values, first_values, _FREE, unsaid=said)
            other = seeds.setdefault(values["train"]["seed"], name)
            if not unlike and other == name:
                continue
            pair = (name, first) if unlike else (name, other)
            why = f"differ in more than the seed ({sweeping.told(unlike)})"
            raise RecipeError(
                f"{pair[0]} and {pair[1]} are of one cell of the table, {cell.network} at "
                f"{cell.task}, and {why if unlike else 'have one seed'}: leave one of them out, or "
                "name another folder (grid.out=...)"
            )


def _usage() -> str:
    """What --help prints: the keys of a grid and of its probes, with their defaults."""
    lines = [(__doc__ or "").strip(), "", *measuring.usage("grid", Options)]
    lines += [
        "  SECTION.KEY=VALUE              of the recipes, for every run; `python -m fastssl.config",
        "                                 RECIPE` lists them",
        "",
        "for the probe:",
    ]
    for section, options in measuring.SECTIONS.items():
        told = measuring.usage(section, options)
        lines += [line for line in told if not line.strip().startswith(_STAGES)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
