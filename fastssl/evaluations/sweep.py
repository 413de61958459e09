"""A recipe at several values of a key: trains each as an ordinary run, one table, one plot.

    python -m fastssl.evaluate sweep RECIPE sweep.key=KEY "sweep.values=[A,B]" [key=value ...]

PIRL's figures (Misra & van der Maaten 2020, section 4.3):
    lambda        recipes/pirl_jigsaw.yaml sweep.key=objective.patch_weight sweep.values=[0,0.5,1]
    permutations  ... sweep.key=pipeline.permutations "sweep.values=[2,24,100,1000,null]"  (all 9!)
    negatives     ... sweep.key=objective.negatives "sweep.values=[64,1024,4096,32000]"

The sections of the recipe hold for every run; `linear`, `features` and `evaluate` for the probe. A
finished run is not run again, an interrupted one goes on: the same command does both. Exit codes:
0 done, 1 a run failed (the table says which), 2 a mistake, 75 stopped by a signal.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastssl import measuring, representation, starting, stopping, sweeping
from fastssl.config import RecipeError
from fastssl.evaluation_task import Cell, Table
from fastssl.recipe_check import check, make, schema_of_settings
from fastssl.recipe_text import in_yaml, read_overrides
from fastssl.sweeping import Outcome, Point, Runner

HELP = "a recipe at several values of a key (lambda, permutations, negatives): table and plot"
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # for all eyes
_One = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The grid, and how its runs are judged."""

    key: str = ""  # of the recipe: objective.patch_weight
    values: tuple[_One | tuple[_One, ...], ...] = ()
    key2: str | None = None  # a second key: every value with every other
    values2: tuple[_One | tuple[_One, ...], ...] = ()
    seeds: tuple[int, ...] = ()  # of train.seed, each a repetition; empty: the recipe's
    probe: Literal["knn", "linear"] = "knn"  # knn: as each run measures it; linear: after it
    processes: int = 1  # of each run: one a GPU
    out: str | None = None  # folder; null: runs/sweep-<recipe>-<key>
    plot: bool = True

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        grid = (
            ("key", self.key, "values", self.values),
            ("key2", self.key2, "values2", self.values2),
        )
        for key, name, values, listed in grid:
            if bool(name) != bool(listed):
                raise ValueError(
                    f"{key} ({name!r}) and {values} ({list(listed)}) belong together: "
                    f"sweep.{key}=objective.patch_weight sweep.{values}=[0,0.5,1]"
                )
            if len({*map(repr, listed)}) < len(listed):
                raise ValueError(f"{values} ({list(listed)}) has a value twice")
            if name in ("train.out", "train.resume", "train.steps", "data.root"):
                raise ValueError(f"{key} ({name}) is not for a sweep: runs would not compare")
        if not self.key:
            raise ValueError(
                "key ('') must name a key of the recipe: sweep.key=objective.patch_weight "
                '"sweep.values=[0,0.5,1]"'
            )
        if self.key == self.key2:
            raise ValueError(f"key and key2 are the same ({self.key})")
        if "train.seed" in (self.key, self.key2) and self.seeds:
            raise ValueError("train.seed is swept by seeds already: give one of them")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds ({list(self.seeds)}) has a seed twice")
        if self.processes < 1:
            raise ValueError(f"processes ({self.processes}) must be at least 1")


# Sections that are the probe's, and not the recipe's.
PROBE = {name: its for name, its in measuring.SECTIONS.items() if name != "knn"}


def usage() -> str:
    """What `evaluate.py sweep --help` prints: the keys of a sweep, with their defaults."""
    lines = [f"sweep: {HELP}", "", (__doc__ or "").strip(), "", *measuring.usage("sweep", Options)]
    lines += [
        "  SECTION.KEY=VALUE              of the recipe, for every run; `python -m fastssl.config",
        "                                 RECIPE` lists them",
        "",
        "with sweep.probe=linear:",
        *(line for section, options in PROBE.items() for line in measuring.usage(section, options)),
    ]
    return "\n".join(lines)


def command(arguments: Sequence[str]) -> tuple[int, Table | None]:
    """The whole command, without the word sweep: the exit code, and the table so far.

    Raises:
        ValueError: a mistake, found before the first run begins.
    """
    recipe, overrides, for_probe, options = _read(arguments)
    if starting.environment("WORLD_SIZE", 1) > 1:
        raise RecipeError(
            "a sweep starts its runs itself, as this one process: leave the launcher's number of "
            f"processes at 1 and give sweep.processes={starting.environment('WORLD_SIZE', 1)}"
        )
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise RecipeError(
            "sweep.plot needs matplotlib: pip install 'fastssl[evaluate]', or sweep.plot=false"
        )
    keys = {options.key: options.values}
    if options.key2 is not None:
        keys[options.key2] = options.values2
    swept = "-".join(key.rpartition(".")[2] for key in keys)
    out = Path(options.out or f"runs/sweep-{Path(recipe).stem}-{swept}")
    points = sweeping.plan(recipe, overrides, keys, options.seeds, out)
    classes = measuring.classes(points[0])
    finished = sum(map(sweeping.is_finished, points))
    starting.say(f"sweep: {len(points)} runs in {out}, {finished} of them finished")
    known = sweeping.measured(out)
    about = {
        "recipe": recipe,
        "keys": list(keys),
        "probe": options.probe,
        "probe_arguments": for_probe,
        "chance": 1 / classes,
        "measured": known,
    }
    runner = Runner()
    outcomes: list[Outcome] = []
    table: Table | None = None
    with runner.listening():
        for number, point in enumerate(points, start=1):
            place = f"{number} of {len(points)}"
            outcome = _run(point, options, runner, place, for_probe, known, out)
            if runner.stopped or outcome is None:
                starting.say("sweep: stopped; the same command goes on from there")
                return stopping.STOPPED, table
            outcomes.append(outcome)
            table = _write(out, about, outcomes, options)
    failed = [each for each in outcomes if each.failed is not None]
    for each in failed:
        starting.say(f"sweep: failed: {each.point.name}: {each.failed}")
    files = ["sweep.md", "sweep.csv", "sweep.json"] + (["sweep.png"] if options.plot else [])
    starting.say(f"sweep: {', '.join(files)} in {out}")
    return int(bool(failed)), table


def _read(arguments: Sequence[str]) -> tuple[str, list[str], list[str], Options]:
    """The recipe, what is for every run, what is for the probe, and the section sweep."""
    words = [each for each in arguments if "=" not in each]
    overrides = [each for each in arguments if "=" in each]
    if len(words) != 1:
        found = f"got {', '.join(words)}" if words else "got none"
        raise RecipeError(f"sweep: expected one recipe, {found}: sweep recipes/pirl_jigsaw.yaml")
    own, for_probe, rest = [], [], []
    for each in overrides:
        section = each.partition("=")[0].partition(".")[0]
        (own if section == "sweep" else for_probe if section in PROBE else rest).append(each)
    errors: list[str] = []
    entries = read_overrides(own, ("sweep",), errors)["sweep"]
    schema = schema_of_settings("sweep", Options)
    values = check(entries, schema, errors)
    options = make("command line", "sweep", schema, entries, values, errors)
    if errors:
        raise RecipeError("\n".join(errors))
    if for_probe and options.probe != "linear":
        raise RecipeError(f"{for_probe[0]}: is for sweep.probe=linear")
    measuring.check_arguments(for_probe)
    if given := [each for each in rest if each.startswith(("train.out=", "train.resume="))]:
        raise RecipeError(f"{given[0]}: every run has a folder of its own: give sweep.out")
    return words[0], rest, for_probe, options


def _run(
    point: Point,
    options: Options,
    runner: Runner,
    place: str,
    for_probe: list[str],
    known: dict[str, float],
    out: Path,
) -> Outcome | None:
    """Trains the point if it must be, and probes it; None when it was stopped."""
    if not sweeping.is_finished(point):
        starting.say(f"sweep: run {place}: {point.name}")
        code, reason = sweeping.train(point, runner, processes=options.processes)
        if code == stopping.STOPPED:
            return None
        if code or not sweeping.is_finished(point):
            return Outcome(point, f"train.py ended with {code}: {reason}")
    task = sweeping.pretext(point)
    if options.probe == "knn":
        accuracy, random = sweeping.knn(point)
        failed = None if accuracy is not None else "no kNN accuracy in its metrics.jsonl"
        return Outcome(point, failed, accuracy, random, task)
    accuracy, reason = _linear(point, runner, for_probe, known)
    random, no_random = None, ""
    if accuracy is not None:
        random, no_random = _random(point, runner, for_probe, known, out)
    if no_random:
        starting.say(f"sweep: {point.name}: of the random network: {no_random}")
    return Outcome(point, reason if accuracy is None else None, accuracy, random, task)


def _linear(
    point: Point, runner: Runner, for_probe: list[str], known: dict[str, float]
) -> tuple[float | None, str]:
    """The linear probe's accuracy of a finished run, and what was wrong."""
    arguments = [*for_probe, *measuring.data_arguments(point)]
    # A run that was trained anew in its folder has other weights.
    name = measuring.fingerprint([str(point.folder), measuring.weights(point.folder), arguments])
    return _measure(str(point.folder), point.folder, arguments, name, runner, known)


def _random(
    point: Point, runner: Runner, for_probe: list[str], known: dict[str, float], out: Path
) -> tuple[float | None, str]:
    """The same of its backbone with the fresh weights of its seed; once for all runs alike."""
    arguments = [*for_probe, *measuring.data_arguments(point)]
    if not any(each.startswith("evaluate.seed=") for each in for_probe):
        arguments.append(f"evaluate.seed={point.recipe.train.seed}")
    values = point.recipe.values
    patches = representation.standardization(values)
    name = measuring.fingerprint(
        ["random", values["backbone"], values["evaluation"], patches, arguments]
    )
    folder = out / f"random-{name}"
    arguments.append(f"evaluate.out={in_yaml(str(folder))}")
    return _measure(f"random:{point.folder}", folder, arguments, name, runner, known)


def _measure(
    run: str, folder: Path, arguments: list[str], name: str, runner: Runner, known: dict[str, float]
) -> tuple[float | None, str]:
    """The linear probe's accuracy of a RUN, whose lines go to `folder`; adds it to `known`."""
    if name in known:
        return known[name], ""
    accuracy, said = measuring.accuracy("linear", run, folder, arguments, runner)
    if accuracy is not None:
        known[name] = accuracy
    return accuracy, said


def _write(out: Path, about: dict[str, Any], outcomes: list[Outcome], options: Options) -> Table:
    """The table and the plot of what there is so far, into `out`."""
    keys, chance = about["keys"], about["chance"]
    sweeping.write_runs(out, keys, outcomes, about)
    table = _table(keys, outcomes, options, chance)
    (out / "sweep.md").write_text(_markdown(table), encoding="utf-8")
    if options.plot:
        _plot(out / "sweep.png", keys, outcomes, options, chance)
    return table


def _table(keys: list[str], outcomes: list[Outcome], options: Options, chance: float) -> Table:
    """A row for each point of the grid: the mean over its seeds."""
    columns = [*keys, "runs", options.probe, "std", "random", "pretext", "state"]
    rows: list[list[Cell]] = []
    for values, group in sweeping.by_values(outcomes).items():
        done = [each for each in group if each.failed is None]
        mean, spread = _mean([each.accuracy for each in done])
        random, _ = _mean([each.random for each in done])
        task, _ = _mean([each.pretext for each in done])
        state = "finished" if len(done) == len(group) else f"failed: {len(group) - len(done)}"
        texts: list[Cell] = [in_yaml(list(v) if isinstance(v, tuple) else v) for v in values]
        rows.append([*texts, len(done), mean, spread, random, task, state])
    recipe = outcomes[0].point.recipe.name
    return Table(f"{recipe}: {options.probe} accuracy; chance {chance:.1%}", columns, rows)


def _markdown(table: Table) -> str:
    def shown(cell: Cell) -> str:
        if cell is None:
            return "-"
        return f"{100 * cell:.1f}" if isinstance(cell, float) else str(cell)

    lines = [table.columns, ["---"] * len(table.columns), *(map(shown, row) for row in table.rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table.title} (all in %)\n\n{body}\n"


def _plot(
    path: Path, keys: list[str], outcomes: list[Outcome], options: Options, chance: float
) -> None:
    """Accuracy over the first key's values, a line for each of the second's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # an extra
    from matplotlib.figure import Figure  # noqa: PLC0415  # an extra

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _, labels, is_log = _axis(options.values)
    groups = sweeping.by_values(outcomes)
    others: list[Any] = [*options.values2] or [None]
    for number, other in enumerate(others):
        xs, means, spreads = _curve(groups, options, other, lambda each: each.accuracy)
        name = (
            options.probe if options.key2 is None else f"{options.key2.rpartition('.')[2]} {other}"
        )
        color = _LINES[number % len(_LINES)]
        label = "random network" if number == 0 else None
        axes.errorbar(xs, means, yerr=spreads, marker="o", capsize=3, color=color, label=name)
        xs, means, _ = _curve(groups, options, other, lambda each: each.random)
        if xs:
            axes.plot(xs, means, ".--", color="#57606a", label=label)
    axes.axhline(100 * chance, color="#57606a", linestyle=":", label="chance")
    if is_log:
        axes.set_xscale("log")
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel(keys[0])
    axes.set_ylabel(f"{options.probe} accuracy (%)")
    repeats = max(map(len, groups.values()))
    axes.set_title(
        outcomes[0].point.recipe.name
        + (f", mean and std of {repeats} runs" if repeats > 1 else ""),
        fontsize="medium",
    )
    axes.legend(frameon=False, fontsize="small")
    part = path.with_name(".sweep.png.tmp")
    figure.savefig(part, format="png", metadata={"Software": None})
    part.replace(path)


def _curve(
    groups: dict[tuple[Any, ...], list[Outcome]],
    options: Options,
    other: Any,
    of: Callable[[Outcome], float | None],
) -> tuple[list[float], list[float], list[float]]:
    """Places on x, means and spreads in per cent; of the values that have any."""
    place, _, _ = _axis(options.values)
    xs, means, spreads = [], [], []
    for value in sorted(options.values, key=place):
        group = groups.get((value,) if options.key2 is None else (value, other), [])
        mean, spread = _mean([of(each) for each in group])
        if mean is not None:
            xs.append(place(value))
            means.append(100 * mean)
            spreads.append(100 * (spread or 0.0))
    return xs, means, spreads


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    return sweeping.mean_and_spread([value for value in values if value is not None])


def _axis(values: Sequence[Any]) -> tuple[Any, list[str] | None, bool]:
    """Where a value stands on x; the names of the places, if values are none; whether x is log."""
    if all(type(value) in (int, float) for value in values):
        is_wide = min(values) > 0 and math.log10(max(values) / min(values)) >= 1.5
        return float, None, is_wide
    places = [repr(value) for value in values]
    texts = [in_yaml(list(value) if isinstance(value, tuple) else value) for value in values]
    return (lambda value: places.index(repr(value))), texts, False
