"""The recipe of a run: one YAML file, every key of it checked before a device is touched.

`python -m fastssl.config RECIPE [section.key=value ...]` prints the recipe with every default and
where each value came from.

The keys of a section are the fields of a dataclass, Options, beside the code that reads them; where
the section has `use:`, that names the module. The last of these wins: defaults, the recipe, its
`demo:` section (only while no data.root is given), the command line.

Where the command line names another module (`backbone.use=fastssl.backbones.vgg`), what the recipe
says of its own module holds as far as the new one has a key of that name, and is left out where it
has none: the data's root, the crop's size, K19's widening mean the same in both. A value which the
new module refuses (`name: resnet50` is none of fastssl.backbones.named) is refused, not replaced by
a default that nobody chose.
"""

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml

from fastssl import demo, loader, optim, probe
from fastssl.recipe_check import Schema, check, make, schema_of_part, schema_of_settings
from fastssl.recipe_text import (
    Entry,
    Layer,
    RecipeError,
    in_yaml,
    is_null,
    read_file,
    read_overrides,
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long, how many at once, what is kept."""

    out: str | None = None  # run folder; null: runs/<name of the recipe>
    epochs: int
    steps: int | None = None  # stop after so many optimizer steps; null: at the end of the epochs
    batch: int  # images an optimizer step, over all processes
    accumulate: int = 1  # parts that a process cuts its share of the batch into
    seed: int = 0
    weights: str | None = None  # start from the backbone of this RUN (a run folder, a .safetensors,
    # torchvision:NAME, ...), which must be of the same shape; null: random weights
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the GPU has it,
    # fp16 on an older GPU, fp32 on the CPU
    resume: str = "auto"  # auto: from the run folder's newest checkpoint; never; or a path
    checkpoint_steps: int = 500
    keep: int = 2  # checkpoints, the newest
    log_steps: int = 50
    chance_steps: int = 2000  # warn if the pretext accuracy is still that of guessing after so many
    clip: float | None = None  # norm of the gradient
    compile: bool = False  # the backbone's forward; colorization, which reads stages(), gains none
    sync_batchnorm: bool = False
    trackers: tuple[str, ...] = ()  # Accelerate's: tensorboard, wandb, ...

    def __post_init__(self) -> None:
        counts = ("epochs", "steps", "batch", "accumulate", "checkpoint_steps", "keep", "log_steps")
        for name in (*counts, "chance_steps"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed ({self.seed}) must be in 0 ... {2**31 - 1}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip ({self.clip}) must be above 0, or null for none")
        if self.out is not None and not self.out.strip():
            raise ValueError(f"out ({self.out!r}) must name a folder, or be null for runs/<recipe>")
        if not self.resume:
            raise ValueError("resume ('') must be auto, never or the path of a checkpoint")
        if self.weights == "":
            raise ValueError("weights ('') must name a RUN, or be null for random weights")


# Sections that name a module: what the module must offer, and one that does.
PARTS = {
    "data": (("Options", "list_samples", "source"), "pipelines.readers.folder"),
    "pipeline": (("Options", "graph"), "pipelines.pirl_jigsaw"),
    "evaluation": (("Options", "graph"), "pipelines.evaluation"),
    "backbone": (("Options", "backbone"), "fastssl.backbones.resnet"),
    "objective": (("Options", "Objective"), "fastssl.objectives.pirl"),
}
SETTINGS = {
    "loader": loader.Options,
    "optim": optim.Options,
    "train": TrainOptions,
    "probe": probe.Options,
}
SECTIONS = (*PARTS, *SETTINGS)
# Keys that a recipe of old may have, and what they are called now.
MOVED = {"train.threads": "loader.threads", "train.prefetch": "loader.prefetch"}

# What a resumed run may set anew: nothing here changes what is learnt.
FREE_ON_RESUME = frozenset(
    [f"train.{key}" for key in ("out", "resume", "steps", "checkpoint_steps", "keep", "log_steps")]
    + ["train.chance_steps", "train.trackers"]
    + ["train.weights"]  # the same by another path: a checkpoint knows their SHA-256
    + ["objective.shard_bank_gb"]  # where the rows lie, not what they are
    + [f"loader.{key}" for key in ("threads", "prefetch", "hw_decoder_load")]
    + [f"loader.decoder_{key}" for key in ("width", "height", "device_mib", "host_mib")]
    + [f"probe.{field.name}" for field in fields(probe.Options)]
)


@dataclass(frozen=True)
class Part:
    """A section that names a module."""

    use: str  # dotted path
    module: ModuleType
    options: Any  # an instance of module.Options


@dataclass(frozen=True)
class Recipe:
    """A recipe, complete and checked."""

    path: str
    name: str  # the file's, without folder and suffix
    data: Part
    pipeline: Part
    evaluation: Part
    backbone: Part
    objective: Part
    loader: loader.Options
    optim: optim.Options
    train: TrainOptions
    probe: probe.Options
    demo: bool  # no data.root was given: built-in images, and the demo section holds
    values: dict[str, dict[str, Any]]  # every section, every key, plain YAML types: as run
    sources: dict[str, str]  # "optim.lr" -> "default", "recipe", "demo", "command line", "weights"


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    instead: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recipe:
    """Reads the recipe at `path`; each of `overrides` is section.key=value, the value in YAML.

    Args:
        path: of the recipe.
        overrides: of the command line.
        instead: sections, of plain values, that stand in place of the recipe's own: what train's
            weights came with.

    Raises:
        RecipeError: all mistakes found, one a line: file and key, what was found, what to write.
    """
    errors: list[str] = []
    recipe, demos = read_file(path, SECTIONS, errors)
    command = read_overrides(overrides, SECTIONS, errors)
    _refuse_moved((recipe, demos, command), errors)
    for section, keys in (instead or {}).items():
        recipe[section] = {key: _entry(section, key, given) for key, given in keys.items()}
        demos[section] = {}
    on_demo = _settle_roots(path, recipe, demos, command, errors)
    made: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for section in SECTIONS:
        lower = (recipe[section], demos[section]) if on_demo else (recipe[section],)
        entries = _joined(*lower, command[section])
        schema = _schema(path, section, entries, errors)
        if schema is not None and "use" in command[section]:
            _leave_out(section, lower, schema, errors)
            entries = _joined(*lower, command[section])
        # A demo section that does not hold is checked all the same: against the recipe as written.
        as_demo = _joined(recipe[section], demos[section])
        demo_schema = schema if on_demo else _schema(path, section, as_demo, errors)
        right = {
            "recipe": check(recipe[section], schema, errors),
            "demo": check(demos[section], demo_schema, errors),
            "command line": check(command[section], schema, errors),
        }
        right["weights"] = right["recipe"]
        given = {
            key: right[entry.source][key]
            for key, entry in entries.items()
            if key in right[entry.source]
        }
        if schema is None:
            continue
        options = make(path, section, schema, entries, given, errors)
        if options is None:
            continue
        if section == "pipeline" and (lacking := {"classes", "largest_crop"} - {*dir(options)}):
            errors.append(
                f"{path}: pipeline.use: {schema.name}.Options must offer {sorted(lacking)}:"
                " pipelines/__init__.py says what"
            )
        made[section] = options
        values[section] = {key: _plain(getattr(options, key)) for key in schema.types}
        if schema.module is not None:
            made[section] = Part(schema.name, schema.module, options)
            values[section] = {"use": schema.name, **values[section]}
        for key in values[section]:
            sources[f"{section}.{key}"] = entries[key].source if key in entries else "default"
    _raise_all(errors)
    return Recipe(str(path), Path(path).stem, **made, demo=on_demo, values=values, sources=sources)


def dump(recipe: Recipe) -> str:
    """The recipe as run, in YAML; `load` reads it back as the same values."""
    lines = []
    for section, values in recipe.values.items():
        lines.append(f"{section}:")
        lines.extend(f"  {in_yaml(key)}: {in_yaml(value)}" for key, value in values.items())
    return "\n".join(lines) + "\n"


def defaults(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What this version takes for a key that is not written, by dotted key, in plain YAML types.

    Args:
        values: of a recipe that has been loaded: they say which modules' defaults.
    """
    found = {}
    for section, keys in values.items():
        if section in SETTINGS:
            options: Any = SETTINGS[section]
        elif "use" in keys:
            options = importlib.import_module(keys["use"]).Options
        else:
            continue
        for field in fields(options):
            if field.default is not MISSING:
                found[f"{section}.{field.name}"] = _plain(field.default)
            elif field.default_factory is not MISSING:
                found[f"{section}.{field.name}"] = _plain(field.default_factory())
    return found


def differences(
    there: dict[str, dict[str, Any]],
    here: dict[str, dict[str, Any]],
    free: Iterable[str] = (),
    *,
    unsaid: Mapping[str, Any] | None = None,
) -> list[str]:
    """What differs between two recipes' `values`, as "optim.lr: 0.1 there, 0.2 here".

    Args:
        there: those of the saved run.
        here: those of this run.
        free: dotted keys that may differ, such as FREE_ON_RESUME.
        unsaid: what holds for keys that `there` lacks, such as `defaults(here)`: a run may be older
            than a key. Without, a key that one of them lacks is a difference.
    """
    then, now = _dotted(there), _dotted(here)
    then |= {key: value for key, value in (unsaid or {}).items() if key in now.keys() - then.keys()}
    return [
        f"{key}: {in_yaml(then[key]) if key in then else 'missing'} there,"
        f" {in_yaml(now[key]) if key in now else 'missing'} here"
        for key in dict.fromkeys([*then, *now])
        if key not in free and (key in then, then.get(key)) != (key in now, now.get(key))
    ]


def check_outputs(wanted: Part, outputs: Iterable[str], put_out_by: Part) -> None:
    """Compares what the objective `wanted` takes with the `outputs` of the graph.

    A parameter of forward with a default may stay away, unless the objective's `takes(options)`
    names it.

    Raises:
        RecipeError: a name is missing or spare.
    """
    forward = inspect.signature(wanted.module.Objective.forward)
    parameters = list(forward.parameters.values())[1:]  # without self
    takes, puts = {each.name for each in parameters}, set(outputs)
    needs = {each.name for each in parameters if each.default is each.empty}
    if "takes" in vars(wanted.module):  # an objective that serves several graphs
        needs |= wanted.module.takes(wanted.options)
    errors: list[str] = []
    if missing := sorted(needs - puts):
        errors.append(
            f"{wanted.use} wants {missing}, which {put_out_by.use} does not put out"
            f" (it puts out {sorted(puts)})"
        )
    if spare := sorted(puts - takes):
        errors.append(
            f"{put_out_by.use} puts out {spare}, which {wanted.use} does not take"
            f" (it takes {sorted(takes)})"
        )
    if errors:
        errors.append(
            "write a pipeline.use and an objective.use that belong together; the parameters of"
            " Objective.forward are exactly the outputs of the graph"
        )
    _raise_all(errors)


def main(arguments: Sequence[str]) -> int:
    """Prints every key with its value and where that came from; returns the exit code."""
    usage = "usage: python -m fastssl.config RECIPE [section.key=value ...]"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        recipe = load(arguments[0], arguments[1:])
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    rows = {key: in_yaml(value) for key, value in _dotted(recipe.values).items()}
    left, right = max(map(len, rows)), min(40, max(map(len, rows.values())))
    # in one piece: a reader such as `head` may go after the first
    print("\n".join(f"{k:<{left}} = {v:<{right}}   # {recipe.sources[k]}" for k, v in rows.items()))
    return 0


def _entry(section: str, key: str, plain: Any) -> Entry:
    """A value that came with weights, as if it were written."""
    node = yaml.compose(in_yaml(plain), yaml.SafeLoader)
    return Entry(node, f"train.weights: {section}.{key}", "weights")


def _settle_roots(
    path: str | Path, recipe: Layer, demos: Layer, command: Layer, errors: list[str]
) -> bool:
    """Whether no data.root was given; then demos gets the folders of the built-in images."""

    def given(root: Entry | None) -> bool:
        return root is not None and not is_null(root.node)

    on_demo = not given({**recipe["data"], **command["data"]}.get("root"))
    for layer in (recipe, command):
        if on_demo or not given(layer["data"].get("root")):
            layer["data"].pop("root", None)
    if "root" in demos["data"]:
        errors.append(f"{path}: demo.data.root: a demo has the built-in images; leave it out")
    if on_demo:
        folders = {"data": demo.folder() / "train", "probe": demo.folder()}
        if given({**recipe["probe"], **demos["probe"], **command["probe"]}.get("root")):
            del folders["probe"]
        for section, folder in folders.items():
            node = yaml.ScalarNode("tag:yaml.org,2002:str", str(folder), style="'")
            demos[section]["root"] = Entry(node, f"{path}: {section}.root", "demo")
    return on_demo


def _refuse_moved(layers: Iterable[Layer], errors: list[str]) -> None:
    """Takes the keys out that stood elsewhere once; their new place is added to `errors`."""
    for layer in layers:
        for old, new in MOVED.items():
            section, _, key = old.partition(".")
            entry = layer[section].pop(key, None)
            if entry is not None:
                errors.append(f"{entry.place}: unknown key; did you mean '{new}'?")


def _schema(
    path: str | Path, section: str, entries: dict[str, Entry], errors: list[str]
) -> Schema | None:
    """What the section may say; None after adding to `errors`."""
    if section in SETTINGS:
        return schema_of_settings(section, SETTINGS[section])
    needs, example = PARTS[section]
    if "use" not in entries:
        errors.append(f"{path}: {section}.use: missing; write for example 'use: {example}'")
        return None
    try:
        return schema_of_part(section, entries["use"], needs, example)
    except ValueError as error:
        errors.append(f"{entries['use'].place}: {error}")
        return None


def _joined(*layers: dict[str, Entry]) -> dict[str, Entry]:
    """Of equal keys, the last one's."""
    return {key: entry for layer in layers for key, entry in layer.items()}


def _leave_out(
    section: str, layers: Iterable[dict[str, Entry]], schema: Schema, errors: list[str]
) -> None:
    """Takes out what was written for another module than that of `schema`, which lacks the key.

    Only what that other module has: a mistake in a recipe is told, whatever the module.
    """
    use: Entry | None = None
    for layer in layers:
        use = layer.get("use", use)  # a demo's keys are for the demo's module, else the recipe's
        if use is None or use.node.value == schema.name:
            continue
        known = {*schema.types, "use", "root"}  # a reader without a root is none: that is told
        lacking = {key: entry for key, entry in layer.items() if key not in known}
        try:
            own = schema_of_part(section, use, *PARTS[section])
        except ValueError:  # it isn't here, as a laboratory's own: what it has can't be known
            own = None
        if own is not None:
            lacking = {key: entry for key, entry in lacking.items() if key in own.types}
        check(lacking, own, errors)
        for key in lacking:
            del layer[key]


def _dotted(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{section}.{key}": values[section][key] for section in values for key in values[section]
    }


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _raise_all(errors: list[str], most: int = 10) -> None:
    errors = list(dict.fromkeys(errors))
    for number, error in enumerate(errors):
        if error.startswith("command line") and "' in quotes" in error:
            errors[number] += " (and once more in quotes, which the shell takes away)"
    if len(errors) > most:
        errors[most:] = [f"... and {len(errors) - most} more"]
    if errors:
        raise RecipeError("\n".join(errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
