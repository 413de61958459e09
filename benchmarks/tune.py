"""Which settings of the loader are fastest here: successive halving over real loaders.

    python -m benchmarks tune RECIPE [section.key=value ...] [--minutes 3] [--yaml FILE]

Tried are threads (1 ... --threads, and one more), batches made ahead, who decodes on a GPU and how
much of it its JPEG engines do, and decoding of regions: the last three where the recipe's graph
looks at them. Each candidate is a Loader on the recipe's images (benchmarks/tune_loaders.py).
benchmarks/halving.py leaves the best few; these and the recipe's present settings take turns in a
final, and only what wins it by more than noise is recommended (benchmarks/tune_verdict.py). Where
the time does not do for all candidates, those that differ from the recipe in one thing come first.
Other sizes of the batch are measured and told, but never recommended: they change what is learnt.

Images are read into the page cache before, so that a disk is not measured. Nor is training, which
takes cores, and a part of the GPU, from the loader: `stages` measures both together.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import halving, method, result
from benchmarks.__main__ import run_command
from benchmarks.halving import Turn
from benchmarks.tune_loaders import (
    Images,
    Turns,
    first_look,
    settings_asked_for,
    short_turn,
    take_turns,
)
from benchmarks.tune_verdict import ROUNDS, block, judge, overrides
from fastssl import config, loader, machine
from fastssl.loader import threads_per_process

HELP = "find the fastest settings of a recipe's loader on this machine, as YAML to paste"

FINALISTS = 3  # and the present settings
QUICK_MINUTES, QUICK_BATCH = 0.1, 16
# Of the time, when each part ends; the last, other sizes of the batch, has the rest.
READING, HALVING, FINAL = 0.1, 0.5, 0.9


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("recipe", metavar="RECIPE", help="such as recipes/rotation.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for training")
    parser.add_argument(
        "--minutes", type=float, default=3.0, metavar="M", help="about, of all (default 3)"
    )
    parser.add_argument("--yaml", type=Path, metavar="FILE", help="write the winning block here")
    method.add_common(parser)
    parser.set_defaults(repeats=ROUNDS)  # of the final; fewer are not taken


def main(given: argparse.Namespace) -> int:
    """Searches, prints table and block, writes what was asked for; returns the exit code."""
    if given.minutes <= 0:
        raise ValueError(f"--minutes ({given.minutes}) must be above 0")
    seconds = 60 * (min(QUICK_MINUTES, given.minutes) if given.quick else given.minutes)
    for path in (given.yaml, given.out):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}: make it")
    recipe = config.load(given.recipe, given.overrides)
    began = time.perf_counter()  # what it imports is no measuring
    images = Images(recipe, until=began + READING * seconds)
    present = replace(recipe.loader, threads=recipe.loader.threads or given.threads)
    most = recipe.train.batch // recipe.train.accumulate
    look = first_look(images, present, min(most, QUICK_BATCH) if given.quick else most)
    every = candidates(
        present,
        cores=given.threads,
        asked=settings_asked_for(images),
        engines=any(gpu["jpeg_engines"] != 0 for gpu in machine.gpus()),
        draw=random.Random(0),
    )
    count, turn = halving.plan(
        len(every),
        began + HALVING * seconds - time.perf_counter(),
        keep=FINALISTS,
        overhead=look.overhead,
        least=(present.prefetch + 1) * look.batch_seconds,
    )
    tried = every[:count]
    names = named(every)
    print(
        f"{images.text}; batches of {look.batch} images, {look.batch / look.batch_seconds:.0f} "
        f"images/s at first sight; trying {count} of {len(every)} candidates"
        + (" (all of them with more --minutes)" if count < len(every) else "")
    )

    # ---- Halving ---------------------------------------------------------------------------------
    search = halving.halve(
        tried,
        lambda options, length: short_turn(images, options, look.batch, length, names[options]),
        keep=FINALISTS,
        seconds=turn,
        until=began + HALVING * seconds,
        draw=random.Random(0),
    )
    contenders = list(dict.fromkeys([*search.best, present]))
    print(f"in the final: {', '.join(names[options] for options in contenders)}")

    # ---- Final -----------------------------------------------------------------------------------
    def length(end: float, turns: float) -> float:
        """Seconds of a turn, for `turns` to be over at `end`, a part of the time."""
        each = (began + end * seconds - time.perf_counter()) / turns
        return min(given.seconds, max(0.2, each - look.overhead))

    rounds = 1 if given.quick else max(ROUNDS, given.repeats)
    final = take_turns(
        {names[options]: (options, look.batch) for options in contenders},
        images,
        repeats=rounds,
        seconds=length(FINAL, len(contenders) * (rounds + 1.5)),  # with the warm-up
    )
    if names[present] in final.failed:
        raise ValueError(f"the recipe's own settings fail: {final.failed[names[present]]}")
    by_options = {o: final.measured[names[o]] for o in contenders if names[o] in final.measured}
    verdict = judge(present, by_options, names)

    # ---- Other sizes of the batch ----------------------------------------------------------------
    sizes = {size for size in (look.batch // 2, look.batch, 2 * look.batch) if size > 0}
    fewer = min(rounds, method.REPEATS)
    batches = take_turns(
        {f"batch={size}": (verdict.winner, size) for size in sorted(sizes)},
        images,
        repeats=fewer,
        seconds=length(1.0, len(sizes) * (fewer + 1.5)),
    )
    about_batches = told_of_batches(batches, look.batch)

    # ---- What came out ---------------------------------------------------------------------------
    rows = [*search_rows(search, names, present, look.batch)]
    rows += final_rows("final", final, names[present])
    rows += final_rows("batch", batches, f"batch={look.batch}")
    print(f"\n{table(rows)}\n\n{verdict.sentence}\n{about_batches}\n")
    kept = as_written(verdict.recommended, present, recipe.loader)
    comments = [f"python -m benchmarks tune {given.recipe}", verdict.sentence, about_batches]
    text = block(kept, comments)
    print(f"on the command line: {' '.join(overrides(kept))}\n\n{text}", end="")
    if given.yaml is not None:
        try:
            given.yaml.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--yaml ({given.yaml}) can't be written: {error.strerror}") from error
    if given.out is not None:
        settings = {
            **{"recipe": given.recipe, "overrides": given.overrides, "minutes": given.minutes},
            **{"note": given.note, "quick": given.quick, "device": images.device.type},
            **{"images": images.count, "batch": look.batch, "tried": count, "of": len(every)},
            **{"present": asdict(present), "winner": asdict(verdict.winner)},
            **{"recommended": asdict(kept), "share_of_rounds": verdict.share},
            "ratio": verdict.ratio,
        }
        made = result.make(
            "tune",
            rows,
            settings,
            [verdict.sentence, about_batches],
            data=Path(images.samples.root),
            page_cache="warm" if images.are_warm else None,
        )
        result.write(given.out, made)
    return 0


# ---- What is tried ------------------------------------------------------------------------------


def candidates(
    present: loader.Options,
    *,
    cores: int,
    asked: Collection[str],
    engines: bool,
    draw: random.Random,
) -> list[loader.Options]:
    """The present settings, then those that differ in one thing, then all others; in random order.

    Args:
        present: the recipe's, with threads.
        cores: that may be used.
        asked: settings of decoding that the graph looks at.
        engines: whether the GPU, if there is one, has hardware JPEG decoders.
        draw: for the order.
    """
    powers = (2**power for power in range(cores.bit_length()))
    near = (present.threads or cores, 3 * cores // 4, cores - 1, cores, cores + 1)
    threads = {count for count in (*powers, *near) if 1 <= count <= cores + 1}
    loads = {present.hw_decoder_load}
    if engines and "hw_decoder_load" in asked:
        loads |= {0.0, 0.35, 0.65, 0.9}
    decoding = {(present.decoder, present.hw_decoder_load)}
    if "decoder" in asked:
        decoding |= {("auto", load) for load in loads} | {("cpu", present.hw_decoder_load)}
    grid = [
        replace(present, threads=n, prefetch=ahead, decoder=who, hw_decoder_load=load, region=part)
        for n, ahead, (who, load), part in itertools.product(
            sorted(threads | {present.threads or cores}),
            sorted({1, 2, 4, present.prefetch}),
            sorted(decoding),
            [True, False] if "region" in asked else [present.region],
        )
    ]
    draw.shuffle(grid)
    here = asdict(present)

    def distance(options: loader.Options) -> int:
        return min(2, sum(value != here[key] for key, value in asdict(options).items()))

    return sorted(grid, key=distance)


def named(options: Sequence[loader.Options]) -> dict[loader.Options, str]:
    """Each as text, such as `threads=2 prefetch=4`: the settings in which they differ."""
    tables = {each: asdict(each) for each in options}
    keys = [key for key in asdict(options[0]) if len({t[key] for t in tables.values()}) > 1]
    return {
        each: " ".join(f"{key}={str(table[key]).lower()}" for key in keys) or "as it is"
        for each, table in tables.items()
    }


def as_written(
    options: loader.Options, present: loader.Options, recipe: loader.Options
) -> loader.Options:
    """`options` for a recipe: threads stay null where they are those that null gives here."""
    by_itself = recipe.threads is None and present.threads == threads_per_process(1)
    if by_itself and options.threads == present.threads:
        return replace(options, threads=None)
    return options


# ---- What is told -------------------------------------------------------------------------------


def search_rows(
    search: halving.Search[loader.Options],
    names: Mapping[loader.Options, str],
    present: loader.Options,
    batch: int,
) -> list[result.Row]:
    """A row for each turn of the halving, round by round, the fastest first."""
    rows = []
    for number, turns in enumerate(search.rounds, 1):
        before = turns.get(present)

        def rate(turn: Turn | str) -> float:
            return turn.rate if isinstance(turn, Turn) else 0.0

        for options, turn in sorted(turns.items(), key=lambda each: -rate(each[1])):
            settings = {**asdict(options), "batch": batch}
            group = f"round {number}"
            if isinstance(turn, str):
                rows.append(_failed_row(names[options], group, settings, turn))
                continue
            if isinstance(before, Turn):
                settings["ratio"] = turn.rate / before.rate
            rows.append(
                result.Row(
                    name=names[options],
                    group=group,
                    unit="images/s",
                    values=[turn.rate],
                    cpu_ms=[turn.cpu_ms],
                    extra=settings,
                )
            )
    return rows


def final_rows(group: str, turns: Turns, to: str) -> list[result.Row]:
    """A row for each contender, the fastest first, with its ratio to the one named `to`."""
    rows = []
    ordered = sorted(turns.measured.items(), key=lambda each: -statistics.median(each[1].rates))
    for name, measured in ordered:
        options, batch = turns.settings[name]
        settings = {**asdict(options), "batch": batch}
        if to in turns.measured:
            ratio = method.ratio(measured, turns.measured[to])
            settings |= dict(zip(("ratio", "ratio_least", "ratio_most"), ratio, strict=True))
        rows.append(method.row(name, group, measured, settings))
    for name, why in turns.failed.items():
        options, batch = turns.settings[name]
        rows.append(_failed_row(name, group, {**asdict(options), "batch": batch}, why))
    return rows


def _failed_row(name: str, group: str, settings: dict[str, object], why: str) -> result.Row:
    """It made no images; a unit of its own, for `compare` to take no ratio of it."""
    extra = {**settings, "failed": why}
    return result.Row.model_validate(
        {"name": name, "group": group, "unit": "images", "values": [0.0], "extra": extra}
    )


def table(rows: Sequence[result.Row]) -> str:
    """The rows, with no more of each one's settings than its name says."""
    shown = []
    for row in rows:
        ratio = [
            row.extra[key] for key in ("ratio", "ratio_least", "ratio_most") if key in row.extra
        ]
        numbers = [f"{each:.3f}" for each in ratio if isinstance(each, float)]
        text = (
            numbers[0] + (f" ({numbers[1]} - {numbers[2]})" if numbers[1:] else "")
            if numbers
            else None
        )
        extra = {"times the present": text, "failed": row.extra.get("failed")}
        shown.append(row.model_copy(update={"extra": extra}))
    return result.table(shown)


def told_of_batches(turns: Turns, base: int) -> str:
    """Which size was fastest; no advice, since the batch changes what is learnt."""
    measured = {turns.settings[name][1]: each for name, each in turns.measured.items()}
    if base not in measured:
        return "Other sizes of the batch could not be measured."
    best = max(measured, key=lambda size: statistics.median(measured[size].rates))
    sizes = ", ".join(map(str, sorted(measured)))
    said = f"Of batches of {sizes} images those of {best} were the fastest"
    if best != base:
        ratio = method.ratio(measured[best], measured[base])
        said += f", {ratio[0]:.3f} ({ratio[1]:.3f} - {ratio[2]:.3f}) times those of {base}"
    return f"{said}; the block leaves the batch as it is, for it changes what is learnt."


if __name__ == "__main__":
    run_command("tune")
