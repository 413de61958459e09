"""Says what a trained backbone is good for: one protocol, one or more runs, one table.

    accelerate launch fastssl/evaluate.py WHAT RUN [RUN ...] data.root=PATH [section.key=value ...]

RUN is a run folder, FILE.safetensors, random:NAME (or :RECIPE.yaml, or :RUN FOLDER),
torchvision:NAME or timm:NAME. PATH holds train/<class>/ and val/<class>/; without data.root the
built-in images are used. Results are also added to metrics.jsonl of each run folder.

Exit codes: 0 done, 1 failed, 2 a mistake in the command or its input.
"""

import contextlib
import dataclasses
import importlib
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script: let imports start at the checkout, not inside fastssl/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# OpenMP's threads spin while they wait, on cores that the loader's threads need. Read once, when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table as Printed

from fastssl import demo, distributed, failures, features, launcher, loader, starting, trained
from fastssl.config import Part, RecipeError
from fastssl.evaluation_task import READER, Cell, Table, Task
from fastssl.recipe_check import Schema, check, make, schema_of_part, schema_of_settings
from fastssl.recipe_text import Entry, did_you_mean, in_yaml, read_overrides
from fastssl.trained import Trained

WHAT = ("linear", "knn", "svm", "fewlabels", "detect", "analyze", "sweep")
TAKE_A_RECIPE = ("sweep",)  # in the place of RUNs: they train what they evaluate
GRAPHS = (("Options", "graph"), "pipelines.evaluation")
READERS = (("Options", "list_samples", "source"), READER)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What holds for every command: the section `evaluate`; `seed=1` is short for evaluate.seed."""

    seed: int = 0  # of fresh weights and of all that a command draws
    out: str | None = None  # folder for pictures and tables; null: <run folder>/evaluations, or
    # evaluations/<name> for a RUN without a folder
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in
    # training, fp32 on a CPU

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed ({self.seed}) must be in 0 ... {2**31 - 1}")


SETTINGS = {
    "loader": loader.Options,
    "features": features.Options,
    "evaluate": Options,
    "weights": trained.Weights,
}


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    asked = [each for each in arguments if each not in ("-h", "--help")]
    if not asked:
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        if len(asked) < len(arguments):
            module = _module(asked[0])
            is_own = asked[0] in TAKE_A_RECIPE
            print(module.usage() if is_own else _help_of(module, asked[0]))
            return 0
        if asked[0] in TAKE_A_RECIPE:
            code, table = _module(asked[0]).command(asked[1:])
            if table is not None:
                show(table)
            return code
        with contextlib.ExitStack() as until_the_end:
            try:
                return evaluate(asked[0], asked[1:], until_the_end)
            except (ValueError, OSError) as error:  # while the process group is there
                return failed(error)
    except (ValueError, OSError) as error:
        return failed(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def failed(error: ValueError | OSError) -> int:
    """Tells a mistake once a machine; returns the exit code.

    The processes of a machine meet the same, and its first one tells it; but once they work
    together, a file or a disk may fail for one of them alone.
    """
    rank = starting.environment("RANK", 0)
    is_own = isinstance(error, loader.DataError | OSError) and dist.is_initialized()
    if starting.environment("LOCAL_RANK", 0) == 0 or is_own:
        where = f" (rank {rank} on {platform.node()})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    return 2 if failures.is_mistake(error) else 1


def evaluate(what: str, arguments: Sequence[str], until_the_end: contextlib.ExitStack) -> int:
    """One command: checks all of it, then evaluates each RUN and prints the table.

    Args:
        what: the command's name.
        arguments: RUNs, and section.key=value.
        until_the_end: closes the process group.

    Raises:
        ValueError: a mistake in the command or its input.
    """
    # ---- What is asked: nothing below has touched a device ------------------------------------
    module = _module(what)
    rank = starting.environment("RANK", 0)
    say = starting.say if rank == 0 else starting.silent
    say_here = starting.say if starting.environment("LOCAL_RANK", 0) == 0 else starting.silent
    names, settings = _read(what, module, arguments)
    options: Options = settings["evaluate"]
    on_cpu = starting.on_cpu()
    precision = starting.mixed_precision(options.precision, on_cpu, key="evaluate.precision")
    reader, is_demo = settings["data"]
    loaded = [
        trained.load(
            name,
            seed=options.seed,
            backbone=backbone,
            ignore=settings["weights"].ignore,
            data_root=None if is_demo else reader.options.root,
        )
        for name, backbone in zip(names, settings["backbone"], strict=True)
    ]
    runs = _told_apart(names, loaded)
    graphs = tuple(_graph(run, settings["evaluation"]) for run in runs)
    outs = tuple(_out(options, run, runs) for run in runs)
    for run, graph in zip(runs, graphs, strict=True):
        _say_what_is_assumed(run, graph, settings["evaluation"], say)
    if is_demo:
        say("data.root is not given: the built-in images are used")
        demo.render(say=say_here)

    # ---- Devices and processes ----------------------------------------------------------------
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    until_the_end.callback(accelerator.end_training)
    threads = loader.threads_per_process(starting.environment("LOCAL_WORLD_SIZE", 1))
    if accelerator.device.type == "cpu":  # launchers set OMP_NUM_THREADS=1, which leaves cores idle
        torch.set_num_threads(threads)
    loading = dataclasses.replace(settings["loader"], threads=settings["loader"].threads or threads)

    # ---- Each RUN -----------------------------------------------------------------------------
    table: Table | None = None
    try:
        for run, graph, out in zip(runs, graphs, outs, strict=True):
            set_seed(options.seed)
            task = Task(
                trained=run,
                accelerator=accelerator,
                reader=reader,
                demo=is_demo,
                graph=graph,
                loading=loading,
                features=settings["features"],
                cache=demo.cache(),
                out=out,
                seed=options.seed,
                say=say,
                runs=runs,
                outs=outs,
                graphs=graphs,
            )
            table = joined(table, module.evaluate(task, settings[what]), run)
            run.backbone.cpu()  # room for the next
            accelerator.wait_for_everyone()
    finally:  # what earlier RUNs gave is shown where a later one fails
        if distributed.rank() == 0 and table is not None:
            show(table)
    return 0


def show(table: Table) -> None:
    """Prints it, for people: numbers to the right, fractions in per cent."""
    console = Console(highlight=False, markup=False)
    printed = Printed(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        is_text = all(isinstance(row[number], str | None) for row in table.rows)
        printed.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        cells = zip(table.columns, row, strict=True)
        printed.add_row(*[_shown(cell, column in table.plain) for column, cell in cells])
    if not console.is_terminal:  # a log has no width
        console.width = 10_000
        printed.expand = False
    console.print(printed)


def _shown(cell: Cell, is_plain: bool) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if is_plain else f"{100 * cell:.1f}"
    return str(cell)


def joined(table: Table | None, more: Table, run: Trained) -> Table:
    """Rows of a further RUN, whose columns may be others: networks differ in their stages."""
    columns, rows = list(more.columns), [list(row) for row in more.rows]
    if "run" not in columns[:1]:
        columns, rows = ["run", *columns], [[run.name, *row] for row in rows]
    if table is None:
        return Table(more.title, columns, rows, more.plain)
    every = list(table.columns)
    for column in columns:
        if column not in every:  # where it stands here: behind the one before it
            at = columns.index(column)
            every.insert(every.index(columns[at - 1]) + 1, column)
    spread = [
        [dict(zip(names, row, strict=True)).get(column) for column in every]
        for names, some in ((table.columns, table.rows), (columns, rows))
        for row in some
    ]
    return Table(table.title, every, spread, tuple({*table.plain, *more.plain}))


# -- the command line ---------------------------------------------------------------------------


def _module(what: str) -> Any:
    if what not in WHAT:
        raise RecipeError(f"{what}: no such evaluation{did_you_mean(what, WHAT)}; {_known()}")
    return importlib.import_module(f"fastssl.evaluations.{what}")


def _known() -> str:
    return f"there are {', '.join(WHAT)}"


def _read(what: str, module: Any, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The RUNs, and every section's options.

    `data` comes with whether it is the built-in images, `backbone` once for each RUN.

    Raises:
        RecipeError: all mistakes found, one a line.
    """
    names, overrides = [], []
    own = {field.name for field in dataclasses.fields(Options)}
    for each in arguments:
        key, equals, _ = each.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w*)*", key) or Path(each).exists():
            names.append(each)
        else:
            overrides.append(f"evaluate.{each}" if key in own else each)
    errors: list[str] = []
    schemas = {name: schema_of_settings(name, its) for name, its in SETTINGS.items()}
    schemas[what] = schema_of_settings(what, module.Options)
    sections = ("data", "evaluation", "backbone", *schemas)
    meant = [each for each in names if _is_option(each, sections)]
    for each in meant:
        key, equals, value = each.lstrip("-").partition("=")
        errors.append(f"{each}: no RUN; write {key}={value if equals else '...'}")
    names = [each for each in names if each not in meant]
    entries = read_overrides(overrides, sections, errors)
    made: dict[str, Any] = {"evaluation": entries["evaluation"]}
    for section, schema in schemas.items():
        values = check(entries[section], schema, errors)
        made[section] = make("command line", section, schema, entries[section], values, errors)
    made["data"] = _data(entries["data"], errors)
    reader, is_demo = made["data"]
    root = None if is_demo or reader is None else reader.options.root
    made["backbone"] = [
        trained.read_backbone(name, entries["backbone"], errors, data_root=root) for name in names
    ]
    if not names:
        errors.append(f"{what}: no RUN; {trained.WAYS}")
    places = [os.path.realpath(os.path.expanduser(name)) for name in names]
    errors += [
        f"{what}: RUN {name} is given twice: leave one out"
        for number, name in enumerate(names)
        if places[number] in places[:number]
    ]
    if errors:
        raise RecipeError("\n".join(dict.fromkeys(errors)))
    return names, made


def _is_option(name: str, sections: Sequence[str]) -> bool:
    """Whether section.key=value was meant: it begins as other programs' options do, or lacks =."""
    section, point, _ = name.partition(".")
    return not Path(name).exists() and (name.startswith("-") or bool(point and section in sections))


def _data(entries: dict[str, Entry], errors: list[str]) -> tuple[Part | None, bool]:
    """The reader, and whether it is of the built-in images: no data.root was given."""
    is_demo = "root" not in entries
    if is_demo:
        entries = {**entries, "root": _entry("data.root", str(demo.folder()))}
    use = entries.get("use") or _entry("data.use", READER)
    try:
        schema = schema_of_part("data", use, *READERS)
    except ValueError as error:
        errors.append(f"{use.place}: {error}")
        return None, is_demo
    values = check(entries, schema, errors)
    made = make("command line", "data", schema, entries, values, errors)
    return None if made is None else _part(schema, made), is_demo


def _graph(run: Trained, entries: dict[str, Entry]) -> Part:
    """How images of the RUN are prepared: as it says itself, but for the command line."""
    use, options = run.preprocessing
    given = entries.get("use")
    errors: list[str] = []
    if given is not None and given.node.value != use:
        options = {}  # another graph has other options
    try:
        schema = schema_of_part("evaluation", given or _entry("evaluation.use", use), *GRAPHS)
    except ValueError as error:
        raise RecipeError(f"{run.name}: evaluation.use: {error}") from error
    values = check(entries, schema, errors)
    if errors:
        raise RecipeError("\n".join(errors))
    # JSON has no tuples.
    base = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    try:
        return _part(schema, schema.options(**{**base, **values}))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{run.name}: evaluation: {error}") from error


def _say_what_is_assumed(
    run: Trained, graph: Part, entries: dict[str, Entry], say: Callable[[str], None]
) -> None:
    """Where the publisher does otherwise, or neither RUN nor command line says how it is done."""
    if run.otherwise and graph.use == trained.GRAPH:
        say(f"{run.name}: its publisher prepares images otherwise: {run.otherwise}")
    if run.preprocessing[1] or "use" in entries:
        return
    assumed = {key: v for key, v in asdict(graph.options).items() if key not in entries}
    if assumed:
        values = ", ".join(f"{key} {value}" for key, value in assumed.items())
        say(
            f"{run.name}: nothing says how its images were prepared: {values} assumed; else give "
            f"evaluation.{next(iter(assumed))}=..."
        )


def _part(schema: Schema, options: Any) -> Part:
    assert schema.module is not None, "schema_of_part gives the module"
    return Part(schema.name, schema.module, options)


def _entry(place: str, text: str) -> Entry:
    return Entry(yaml.ScalarNode("tag:yaml.org,2002:str", text, style="'"), place, "command line")


def _told_apart(names: Sequence[str], runs: Sequence[Trained]) -> tuple[Trained, ...]:
    """Those of one name get as many folders that they lie in before it as tell them apart.

    Args:
        names: as written on the command line, no two the same; they serve where folders don't.
        runs: what they name.
    """
    told = [run.name for run in runs]
    for name in {each for each in told if told.count(each) > 1}:
        alike = [number for number, run in enumerate(runs) if run.name == name]
        parents = [_place(names[number]).parent.parts[1:] for number in alike]
        own = name.removeprefix("random:")
        random = name.removesuffix(own)
        for count in range(1, 1 + max(map(len, parents))):
            longer = [random + "/".join([*each[-count:], own]) for each in parents]
            if len(set(longer)) == len(longer):
                break
        else:  # one network, in several words
            longer = [names[number] for number in alike]
        for number, each in zip(alike, longer, strict=True):
            told[number] = each
    return tuple(dataclasses.replace(run, name=each) for run, each in zip(runs, told, strict=True))


def _place(name: str) -> Path:
    """The folder or file that a RUN names; of the two files of a run folder, the folder."""
    path = Path(name.removeprefix("random:")).expanduser().resolve()
    return path.parent if path.name in ("backbone.json", "backbone.safetensors") else path


def _out(options: Options, run: Trained, runs: Sequence[Trained]) -> Path:
    plain = re.sub(r"[^\w.-]+", "-", run.name)
    if options.out is not None:
        out = Path(options.out).expanduser()
        return out / plain if len(runs) > 1 else out
    return Path("evaluations") / plain if run.folder is None else run.folder / "evaluations"


# -- help ---------------------------------------------------------------------------------------


def _help() -> str:
    lines = [f"  {what:<10} {_module(what).HELP}" for what in WHAT]
    ask = "accelerate launch fastssl/evaluate.py WHAT --help  lists the keys of one"
    return "\n".join([(__doc__ or "").strip(), "", "WHAT is one of", *lines, "", ask])


def _help_of(module: Any, what: str) -> str:
    lines = [f"{what}: {module.HELP}", ""]
    documented = {what: module.Options, **SETTINGS}
    for section, options in documented.items():
        for each in dataclasses.fields(options):
            has_default = each.default is not dataclasses.MISSING
            default = in_yaml(_plain(each.default)) if has_default else "(needed)"
            lines.append(f"  {section}.{each.name}={default}")
    lines += [
        "  data.root=PATH                 train/<class>/ and val/<class>/; data.* of the reader",
        "  evaluation.KEY=VALUE           of the evaluation graph, such as evaluation.crop=96",
        "  backbone.KEY=VALUE             of a lone .safetensors (backbone.name=resnet50) or",
        "                                 of random:NAME (backbone.widening=1)",
    ]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    launcher.mend()
    sys.exit(main(sys.argv[1:]))
