"""Every recipe's task at its real sizes, beside the same task done without fastssl.

    python -m benchmarks tasks [RECIPE ...] --data FOLDER [section.key=value ...]

For each recipe by turns in one process:
  fastssl       its graph through fastssl.loader: what training gets
  pil           torch DataLoader, Pillow and torchvision.transforms as users write them, a worker a
                core
  tuned         torch DataLoader as an expert writes it: simplejpeg, uint8 tensors, the fastest
                number of workers of --workers
  ffcv          FFCV from the bytes of the same JPEGs, for the tasks that it has operators for;
                benchmarks/plain/ffcv.py says how to build it
  bound         DALI at decoding and resizing alone: fastssl if all else were free
  decode_limit  libjpeg-turbo on all threads, whole images from memory
A contender's figure is printed only after its labels were recovered from its pixels and its crops,
flips, gray and blur were found drawn as the recipe says (benchmarks/gate.py). What fails on the way
is told and left out, with exit code 1; the others go on.
"""

import argparse
import os
import statistics
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

# As in fastssl/train.py: OpenMP's threads must not spin on cores that the loader's need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks import (
    bounds,
    contenders,
    decode_limit,
    gate,
    method,
    promises,
    result,
    same_files,
)
from benchmarks.__main__ import run_command
from benchmarks.contenders import Task
from benchmarks.method import Contender, Measured
from benchmarks.plain import ffcv, pil, tuned
from benchmarks.result import Row
from benchmarks.same_files import Files
from fastssl import config, demo
from fastssl.config import Recipe
from fastssl.loader import Options

HELP = "the loader at every recipe's task, beside plain alternatives for the same task"

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ALTERNATIVES = ("pil", "tuned", "ffcv")
SECONDS = 2.0  # of a turn; 14 recipes take most of half an hour
BATCH = {"cpu": 32, "cuda": 128}  # images
# What a contender may die of: FFCV's process, DALI, a worker's file, memory; ValueError, of which
# are `gate.UnfitError` and the loader's, is no user's mistake once measuring has begun.
FAILURES = (ValueError, RuntimeError, OSError, MemoryError)

Extra = dict[str, float | int | str | bool | None]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The recipes, the images, who takes part, and the common options."""
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="a YAML file or its name in recipes/ (default: all there); section.key=value for all",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="images")
    parser.add_argument(
        "--alternatives",
        default=",".join(ALTERNATIVES),
        metavar="NAMES",
        help="comma-separated (default: %(default)s); empty: none",
    )
    parser.add_argument(
        "--workers",
        metavar="N,N",
        help="of tuned, to be tried (default: none, half the threads, as many as threads)",
    )
    parser.add_argument(
        "--batch", type=int, help=f"images (default: {BATCH['cpu']}, with a GPU {BATCH['cuda']})"
    )
    parser.add_argument("--ffcv-python", metavar="PATH", help="an interpreter that has FFCV")
    method.add_common(parser, seconds=SECONDS)


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON of what there is; 1 if something failed.

    Raises:
        ValueError: a mistake in the arguments, a recipe or the data, told before anything is
            measured.
    """
    names = [each for each in arguments.recipes if "=" not in each]
    overrides = [each for each in arguments.recipes if "=" in each]
    alternatives = _alternatives(arguments.alternatives)
    workers = _workers(arguments.workers, arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = BATCH[device.type] if arguments.batch is None else arguments.batch
    if batch < 1:
        raise ValueError(f"--batch ({batch}) must be at least 1")
    if "ffcv" in alternatives:
        with suppress(ffcv.Unavailable):  # that is told recipe by recipe
            ffcv.interpreter(arguments.ffcv_python)
    recipes = [
        config.load(str(path), [f"data.root={arguments.data}", *overrides])
        for path in (map(_recipe_file, names) if names else sorted(RECIPES.glob("*.yaml")))
    ]
    for recipe in recipes:
        promises.of(recipe.pipeline.use, recipe.pipeline.options)
        bounds.resizes(recipe.pipeline.use)
    minutes = expected_minutes(
        len(recipes), len(alternatives), len(workers), arguments.repeats, arguments.seconds
    )
    stems = ", ".join(Path(recipe.path).stem for recipe in recipes)
    _say(f"{stems}, about {minutes:.0f} minutes")
    listed: dict[str, Files] = {}
    for recipe in recipes:
        if _data(recipe) not in listed:  # most recipes read the same images
            loading = replace(recipe.loader, threads=arguments.threads)
            listed[_data(recipe)] = _choose(recipe, loading)

    done = _Done()
    with tempfile.TemporaryDirectory() as temporary:
        for recipe in recipes:
            task = Task(
                recipe=Path(recipe.path).stem,
                graph=recipe.pipeline.use,
                module=recipe.pipeline.module,
                options=recipe.pipeline.options,
                files=listed[_data(recipe)],
                batch=batch,
                loading=replace(recipe.loader, threads=arguments.threads),
                device=device,
            )
            _say(f"\n{task.recipe}")
            try:
                _measure(task, alternatives, workers, arguments, Path(temporary), done)
            except FAILURES as reason:
                done.leave_out(task.recipe, reason, failed=True)
    if done.rows:
        _say(f"\n{table(done.rows)}\n")
        _say("\n".join(done.conclusions))
    if arguments.out is not None:
        settings = {
            "recipes": {Path(recipe.path).stem: recipe.values["pipeline"] for recipe in recipes},
            "overrides": overrides,
            "images": {key: files.facts for key, files in listed.items()},
            "device": str(device),
            "batch": batch,
            "threads": arguments.threads,
            "workers_tried": workers,
            "repeats": arguments.repeats,
            "seconds": arguments.seconds,
            "left_out": done.left_out,
            "note": arguments.note,
        }
        made = result.make(
            "tasks",
            done.rows,
            settings,
            done.conclusions,
            data=arguments.data,
            page_cache="warm",
            versions=done.versions,
        )
        result.write(arguments.out, made)
    return int(done.failed)


@dataclass
class _Done:
    """What came out so far."""

    rows: list[Row] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # a recipe, or one and who -> why
    versions: dict[str, str] = field(default_factory=dict)  # of FFCV
    failed: bool = False

    def leave_out(self, who: str, reason: object, *, failed: bool) -> None:
        """Says why in a line."""
        text = textwrap.shorten(str(reason), 300, placeholder=" ...") or type(reason).__name__
        _say(f"{who} is left out: {text}")
        self.left_out[who] = text
        self.failed = self.failed or failed


def _measure(
    task: Task,
    alternatives: Sequence[str],
    workers: Sequence[int],
    arguments: argparse.Namespace,
    temporary: Path,
    done: _Done,
) -> None:
    """Adds a recipe's rows to `done`; what fails of fastssl or while measuring is raised."""
    gate.check("fastssl", task.graph, task.options, contenders.fastssl_make(task))
    measuring = [contenders.fastssl(task), contenders.bound(task)]
    extras: dict[str, Extra] = {}
    try:
        limit = _decode_limit(task)
        if limit is not None:
            measuring.append(limit)
        for name in alternatives:
            who = f"{task.recipe} {name}"
            if task.files.together:
                done.leave_out(
                    who, "its images lie together in a store, not in files", failed=False
                )
                continue
            try:
                made, extras[name] = _alternative(
                    name, task, workers, arguments.seconds, arguments.ffcv_python, temporary
                )
            except ffcv.Unavailable as reason:
                done.leave_out(who, reason, failed=False)
            except FAILURES as reason:
                # any other ValueError says that it has no version of the task
                known = isinstance(reason, ValueError) and not isinstance(reason, gate.UnfitError)
                done.leave_out(who, reason, failed=not known)
            else:
                measuring.append(made)
        measured = method.alternate(
            measuring, repeats=arguments.repeats, seconds=arguments.seconds, say=_say
        )
    finally:  # once more where `alternate` did it
        for contender in measuring:
            if contender.close is not None:
                contender.close()
    if "ffcv" in measured:
        done.versions["ffcv"] = str(extras["ffcv"]["version"])
    done.rows += rows_of(task, measured, extras)
    done.conclusions.append(conclusion(task.recipe, measured))


def expected_minutes(
    recipes: int, alternatives: int, workers: int, repeats: int, seconds: float
) -> float:
    """Of a run with the usual tasks: a turn takes longer than `seconds`, and warming up some."""
    turns = (3 + alternatives) * (repeats + 1.5)
    sweep = 2.5 * workers
    return recipes * ((turns + sweep) * (seconds + 1) + 15) / 60


def rows_of(
    task: Task, measured: dict[str, Measured], extras: Mapping[str, Extra] | None = None
) -> list[Row]:
    """The contenders of a recipe: images/s, and what else is told of them."""
    views, patches = count_frames(task)
    ours = measured["fastssl"]
    rows = []
    for name, each in measured.items():
        extra: Extra = {"batch": task.batch, **(extras or {}).get(name, {})}
        if name == "fastssl":
            extra |= {"views": views, "patches": patches}
        else:  # of fastssl to this one: median, least and greatest
            middle, least, most = method.ratio(ours, each)
            extra |= {"ratio": middle, "ratio_least": least, "ratio_most": most}
        rows.append(method.row(name, task.recipe, each, extra))
    return rows


def count_frames(task: Task) -> tuple[int, int]:
    """Views and patches that the task makes of an image."""
    counts = [0, 0]
    described = promises.of(task.graph, task.options)
    for frames in described.frames:
        shape = described.shapes[frames.name]
        counts[frames.patches] += shape[0] if len(shape) == 4 else 1
    return counts[0], counts[1]


def table(rows: Sequence[Row]) -> str:
    """In Markdown, a line a recipe; medians, and of ratios within a repeat also the spread."""
    titles = ["recipe", "fastssl images/s", "views/s, patches/s", "CPU ms/image"]
    titles += ["of decode limit", "bound images/s", *(f"to {name}" for name in ALTERNATIVES)]
    lines = [titles, ["---"] * len(titles)]
    for group in dict.fromkeys(row.group for row in rows):
        named = {row.name: row for row in rows if row.group == group}
        ours = named["fastssl"]
        rate = statistics.median(ours.values)
        made = [
            f"{result.number(rate * float(ours.extra[kind] or 0))} {kind}"
            for kind in ("views", "patches")
            if ours.extra[kind]
        ]
        lines.append(
            [
                group,
                result.spread(ours.values),
                ", ".join(made),
                result.spread(ours.cpu_ms),
                _ratio(named.get("decode_limit")),
                result.spread(named["bound"].values),
                *(_ratio(named.get(name)) for name in ALTERNATIVES),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conclusion(recipe: str, measured: dict[str, Measured]) -> str:
    """A recipe in a sentence."""
    ours = measured["fastssl"]
    parts = [
        f"{method.ratio(ours, measured[name])[0]:.2f} times {name}"
        for name in ALTERNATIVES
        if name in measured
    ]
    parts.append(f"{method.ratio(ours, measured['bound'])[0]:.2f} of decoding and resizing alone")
    if "decode_limit" in measured:
        parts.append(f"{method.ratio(ours, measured['decode_limit'])[0]:.2f} of the decode limit")
    rate = statistics.median(ours.rates)
    return f"{recipe}: {result.number(rate)} images/s, {', '.join(parts)}"


def _alternative(
    name: str,
    task: Task,
    workers: Sequence[int],
    seconds: float,
    python: str | None,
    temporary: Path,
) -> tuple[Contender, Extra]:
    """One that has passed the gate, and what its row tells of it: its workers, or its version.

    Raises:
        gate.UnfitError: it does not do the task.
        ValueError: it has no version of the task, or none of what an option asks for.
        ffcv.Unavailable: it is not installed, or can't do the task.
    """
    if name == "ffcv":
        make = contenders.ffcv_make(task, python, temporary)
        gate.check(name, task.graph, task.options, make)
        contender, version = contenders.ffcv_contender(task, python, temporary)
        return contender, {"version": version, "workers": task.threads}
    module = {"pil": pil, "tuned": tuned}[name]
    gate.check(name, task.graph, task.options, contenders.plain_make(task.graph, module))
    if name == "pil" or len(workers) == 1:
        count = task.threads if name == "pil" else workers[0]
        return contenders.plain(task, name, module, count), {"workers": count}
    measured = method.alternate(
        [contenders.plain(task, str(count), module, count) for count in workers],
        repeats=1,
        seconds=seconds,
        say=lambda _: None,
    )
    rates = {count: measured[str(count)].rates[0] for count in workers}
    best = max(workers, key=lambda count: rates[count])
    told = ", ".join(f"{count}: {result.number(rate)}" for count, rate in rates.items())
    _say(f"{name}: images/s by workers {told}; {best} is taken")
    return contenders.plain(task, name, module, best), {"workers": best}


def _decode_limit(task: Task) -> Contender | None:
    limit = decode_limit.decoder()
    if limit is None:
        _say(f"decode_limit is left out: {decode_limit.REMEDY}")
        return None
    jpegs = decode_limit.decodable(task.files.contents, limit[1], task.threads)
    if not jpegs:
        _say("decode_limit is left out: none of the images is a JPEG")
        return None
    return decode_limit.contender(jpegs, limit[1], batch=task.batch, threads=task.threads)


def _data(recipe: Recipe) -> str:
    """What tells one set of images from another."""
    return f"{recipe.data.use} {recipe.data.options}"


def _choose(recipe: Recipe, loading: Options) -> Files:
    """The images that are gone over, read once."""
    samples = recipe.data.module.list_samples(recipe.data.options, cache=demo.cache(), say=_say)
    return same_files.choose(recipe, samples, loading, _say)


def _recipe_file(name: str) -> Path:
    inside = RECIPES / f"{name}.yaml"
    return inside if inside.is_file() else Path(name)


def _alternatives(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in ALTERNATIVES:
            raise ValueError(
                f"--alternatives: {name!r} is not known; there are {', '.join(ALTERNATIVES)}"
            )
    return names


def _workers(text: str | None, threads: int) -> list[int]:
    """How many workers `tuned` is tried with."""
    if text is None:
        return sorted({0, threads // 2, threads})
    try:
        counts = sorted({int(each) for each in text.split(",")})
    except ValueError:
        counts = [-1]
    if counts[0] < 0:
        raise ValueError(f"--workers ({text}) must be whole numbers from 0 on, such as 0,1,2")
    return counts


def _ratio(row: Row | None) -> str:
    """Of fastssl to that contender."""
    if row is None:
        return "-"
    middle, least, most = (row.extra[f"ratio{part}"] for part in ("", "_least", "_most"))
    assert isinstance(middle, float)
    assert isinstance(least, float)
    assert isinstance(most, float)
    if len(row.values) == 1:
        return f"{middle:.2f}"
    return f"{middle:.2f} ({least:.2f} - {most:.2f})"


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command("tasks")
