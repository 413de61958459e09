"""The recipe of a run: one YAML file, every key of it checked before a device is touched.

`python -m fastssl.config RECIPE [section.key=value ...]` prints the recipe with every default and
where each value came from.

The keys of a section are the fields of a dataclass, Options, beside the code that reads them; where
the section has `use:`, that names the module. The last of these wins: defaults, the recipe, its
`demo:` section (only while no data.root is given), the command line.
"""

import difflib
import importlib
import inspect
import math
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from yaml.constructor import SafeConstructor

from fastssl import demo, optim, probe


class RecipeError(ValueError):
    """A mistake in a recipe, its input or the run folder; the message is all that the user sees."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long, how many at once, what is kept."""

    out: str | None = None  # run folder; null: runs/<name of the recipe>
    epochs: int
    steps: int | None = None  # stop after so many optimizer steps; null: at the end of the epochs
    batch: int  # images an optimizer step, over all processes
    accumulate: int = 1  # parts that a process cuts its share of the batch into
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 where the GPU has it, ...
    # fp16 on an older one, fp32 on the CPU
    resume: str = "auto"  # auto: from the run folder's newest checkpoint; never; or a path
    checkpoint_steps: int = 500
    keep: int = 2  # checkpoints, the newest
    log_steps: int = 50
    clip: float | None = None  # norm of the gradient
    compile: bool = False
    sync_batchnorm: bool = False
    threads: int | None = None  # DALI's, a process; null: cores allowed / processes on this machine
    prefetch: int = 2  # batches made ahead
    trackers: tuple[str, ...] = ()  # Accelerate's: tensorboard, wandb, ...

    def __post_init__(self) -> None:
        counts = ("epochs", "steps", "batch", "accumulate", "checkpoint_steps", "keep", "log_steps")
        for name in (*counts, "threads", "prefetch"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed ({self.seed}) must be in 0 ... {2**31 - 1}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip ({self.clip}) must be above 0, or null for none")
        if not self.resume:
            raise ValueError("resume ('') must be auto, never or the path of a checkpoint")


# Sections that name a module: what the module must offer, and one that does.
PARTS = {
    "data": (("Options", "list_samples", "source"), "pipelines.readers.folder"),
    "pipeline": (("Options", "graph"), "pipelines.pirl_jigsaw"),
    "evaluation": (("Options", "graph"), "pipelines.evaluation"),
    "backbone": (("Options", "backbone"), "fastssl.backbones.resnet"),
    "objective": (("Options", "Objective"), "fastssl.objectives.pirl"),
}
SETTINGS = {"optim": optim.Options, "train": TrainOptions, "probe": probe.Options}
SECTIONS = (*PARTS, *SETTINGS)

# What a resumed run may set anew: nothing here changes what is learnt.
FREE_ON_RESUME = frozenset(
    [f"train.{key}" for key in ("out", "resume", "steps", "checkpoint_steps", "keep", "log_steps")]
    + [f"train.{key}" for key in ("threads", "prefetch", "trackers")]
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
    optim: optim.Options
    train: TrainOptions
    probe: probe.Options
    demo: bool  # no data.root was given: built-in images, and the demo section holds
    values: dict[str, dict[str, Any]]  # every section, every key, plain YAML types: as run
    sources: dict[str, str]  # "optim.lr" -> "default", "recipe", "demo" or "command line"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe at `path`; each of `overrides` is section.key=value, the value in YAML.

    Raises:
        RecipeError: all mistakes found, one a line: file and key, what was found, what to write.
    """
    errors: list[str] = []
    recipe, demos = _read_file(path, errors)
    command = _read_overrides(overrides, errors)
    on_demo = _settle_roots(path, recipe, demos, command, errors)
    made: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for section in SECTIONS:
        entries = {**recipe[section], **(demos[section] if on_demo else {}), **command[section]}
        schema = _schema(path, section, entries, errors)
        # A demo section that does not hold is checked all the same: against the recipe as written.
        as_demo = {**recipe[section], **demos[section]}
        demo_schema = schema if on_demo else _schema(path, section, as_demo, errors)
        given: dict[str, Any] = {}
        for layer, against in ((recipe, schema), (demos, demo_schema), (command, schema)):
            for key, value in _check(layer[section], against, errors).items():
                if entries.get(key) is layer[section][key]:  # no later layer has replaced it
                    given[key] = value
        if schema is None:
            continue
        options = _options(path, section, schema, entries, given, errors)
        if options is None:
            continue
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
        lines.extend(f"  {_yaml(key)}: {_yaml(value)}" for key, value in values.items())
    return "\n".join(lines) + "\n"


def differences(
    there: dict[str, dict[str, Any]], here: dict[str, dict[str, Any]], free: Iterable[str] = ()
) -> list[str]:
    """What differs between two recipes' `values`, as "optim.lr: 0.1 there, 0.2 here".

    Args:
        there: those of the saved run.
        here: those of this run.
        free: dotted keys that may differ, such as FREE_ON_RESUME.
    """
    then, now = _dotted(there), _dotted(here)
    return [
        f"{key}: {_yaml(then[key]) if key in then else 'missing'} there,"
        f" {_yaml(now[key]) if key in now else 'missing'} here"
        for key in dict.fromkeys([*then, *now])
        if key not in free and (key in then, then.get(key)) != (key in now, now.get(key))
    ]


def check_outputs(wanted: Part, outputs: Iterable[str], put_out_by: Part) -> None:
    """Compares what the objective `wanted` takes with the `outputs` of the graph.

    Raises:
        RecipeError: a name is missing or spare.
    """
    names = list(inspect.signature(wanted.module.Objective.forward).parameters)
    takes, puts = set(names[1:]), set(outputs)  # without self
    errors: list[str] = []
    if missing := sorted(takes - puts):
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
    rows = {key: _yaml(value) for key, value in _dotted(recipe.values).items()}
    left, right = max(map(len, rows)), min(40, max(map(len, rows.values())))
    # in one piece: a reader such as `head` may go after the first
    print("\n".join(f"{k:<{left}} = {v:<{right}}   # {recipe.sources[k]}" for k, v in rows.items()))
    return 0


# What was written, and where.


class _Entry(NamedTuple):
    node: yaml.Node
    place: str  # "recipes/pirl.yaml: optim.lr"
    source: str  # as in Recipe.sources


_Layer = dict[str, dict[str, _Entry]]  # section -> key -> what was written


def _read_file(path: str | Path, errors: list[str]) -> tuple[_Layer, _Layer]:
    """The recipe's own sections, and those under demo."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text from byte {error.start} on") from None
    except OSError as error:
        there = sorted({*Path(path).parent.glob("*.yaml"), *Path("recipes").glob("*.yaml")})
        near = _near(str(path), [str(each) for each in there])
        raise RecipeError(f"{path}: {error.strerror}{near}") from None
    root = _compose(text, str(path))
    if not isinstance(root, yaml.MappingNode):
        found = "an empty file" if root is None else _shown(root)
        raise RecipeError(f"{path}: expected sections such as 'data:', got {found}")
    demos = [node for key, node in root.value if key.value == "demo"]
    return (
        _read_sections(root, f"{path}: ", "recipe", errors),
        _read_sections(demos[0] if demos else None, f"{path}: demo.", "demo", errors),
    )


def _read_sections(root: yaml.Node | None, where: str, source: str, errors: list[str]) -> _Layer:
    layer: _Layer = {section: {} for section in SECTIONS}
    for section, node in _items(root, where, errors):
        if section in layer:
            for key, value in _items(node, f"{where}{section}.", errors):
                layer[section][key] = _Entry(value, f"{where}{section}.{key}", source)
        elif (section, source) != ("demo", "recipe"):
            errors.append(f"{where}{section}: unknown section{_near(section, SECTIONS)}")
    return layer


def _items(
    node: yaml.Node | None, where: str, errors: list[str]
) -> Iterator[tuple[str, yaml.Node]]:
    """The keys of a mapping. Of two equal ones, PyYAML would silently take the last."""
    place = where.rstrip(".: ")
    if node is None or _is_null(node):
        return
    if not isinstance(node, yaml.MappingNode):
        errors.append(f"{place}: expected keys (as in 'key: value'), got {_shown(node)}")
        return
    seen = set()
    for key, value in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not key.tag.endswith(":str"):
            errors.append(f"{place}: {line}: expected a word as key, got {_shown(key)}")
        elif not key.value.isidentifier():
            errors.append(f"{place}: {line}: expected 'key: value', got {_shown(key)} for a key")
        elif key.value in seen:
            errors.append(f"{where}{key.value}: given a second time in {line}; keep one")
        else:
            seen.add(key.value)
            yield key.value, value


def _compose(text: str, place: str) -> yaml.Node | None:
    """YAML's syntax, before types."""
    try:
        events = yaml.parse(text, yaml.SafeLoader)
        aliases = [each for each in events if isinstance(each, yaml.AliasEvent)]
        root = None if aliases else yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{place}: {line}not YAML: {said}") from None
    except RecursionError:
        raise RecipeError(f"{place}: not YAML for a recipe: nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # bad characters and escapes
        raise RecipeError(f"{place}: not YAML: {' '.join(str(error).split())}") from None
    if aliases:  # one may hold itself
        line = aliases[0].start_mark.line + 1
        raise RecipeError(f"{place}: line {line}: *{aliases[0].anchor}: write the value itself")
    return root


def _read_overrides(overrides: Sequence[str], errors: list[str]) -> _Layer:
    """What the command line says. Of two equal keys the last holds, as in other commands."""
    layer: _Layer = {section: {} for section in SECTIONS}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, _, key = name.partition(".")
        place, text = f"command line: {name or repr(override)}", text.strip()
        if section == "demo":
            errors.append(
                f"{place}: only a file has a demo section; write for example train.epochs=1"
            )
        elif section not in layer:
            errors.append(f"{place}: unknown section {section!r}{_near(section, SECTIONS)}")
        elif not key:
            errors.append(f"{place}: is a whole section; write {section}.key=value, key by key")
        elif not equals:
            errors.append(f"{place}: has no '='; write {name}=value")
        elif not text:
            errors.append(f"{place}: no value after '='; write {name}=null for none")
        else:
            try:
                node = _compose(text, place)
            except RecipeError as error:
                errors.append(f"{error}; write '{text}' in quotes")
                continue
            if node is None or (_is_plain(node) and node.value != text):
                found = "nothing" if node is None else repr(node.value)
                errors.append(f"{place}: of {text!r} YAML reads {found}; write '{text}' in quotes")
            else:
                layer[section][key] = _Entry(node, place, "command line")
    return layer


def _settle_roots(
    path: str | Path, recipe: _Layer, demos: _Layer, command: _Layer, errors: list[str]
) -> bool:
    """Whether no data.root was given; then demos gets the folders of the built-in images."""

    def given(root: _Entry | None) -> bool:
        return root is not None and not _is_null(root.node)

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
            demos[section]["root"] = _Entry(node, f"{path}: {section}.root", "demo")
    return on_demo


# What may be written: the Options of a section.


class _Schema(NamedTuple):
    name: str  # of the module, or of the section
    module: ModuleType | None
    use: _Entry | None
    options: Any  # the dataclass
    types: dict[str, tuple[Any, TypeAdapter[Any]]]  # key -> annotation, and what checks it


def _schema(
    path: str | Path, section: str, entries: dict[str, _Entry], errors: list[str]
) -> _Schema | None:
    """None after adding to `errors`."""
    if section in SETTINGS:
        return _Schema(section, None, None, SETTINGS[section], _types(SETTINGS[section]))
    names, example = PARTS[section]
    if "use" not in entries:
        errors.append(f"{path}: {section}.use: missing; write for example 'use: {example}'")
        return None
    use = entries["use"]
    try:
        dotted = _value(use.node)
        module = _import(dotted, example)
        if absent := [name for name in names if name not in vars(module)]:
            raise ValueError(
                f"{dotted} has no {', '.join(absent)}; {section} needs {', '.join(names)}"
            )
        return _Schema(dotted, module, use, module.Options, _types(module.Options))
    except ValueError as error:
        errors.append(f"{use.place}: {error}")
        return None


def _types(options: Any) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """What each key takes; reads annotations that are text (`from __future__`) too."""
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    try:
        hints = get_type_hints(options)
        names = [field.name for field in fields(options) if field.init]
        return {name: (hints[name], TypeAdapter(hints[name], config=strict)) for name in names}
    except (NameError, TypeError, PydanticUserError) as error:
        where = f"{options.__module__}.{options.__name__}" if isinstance(options, type) else options
        raise ValueError(f"{where} must be a dataclass of plain types: {error}") from None


def _import(dotted: Any, example: str) -> ModuleType:
    if not isinstance(dotted, str) or not all(part.isidentifier() for part in dotted.split(".")):
        raise ValueError(f"expected the dotted name of a module, as {example}, got {dotted!r}")
    try:
        return importlib.import_module(dotted)
    except Exception as error:  # whatever the module does: shown, without our frames
        if isinstance(error, ModuleNotFoundError) and f"{dotted}.".startswith(f"{error.name}."):
            raise ValueError(_not_there(str(error.name))) from None
        frames = traceback.extract_tb(error.__traceback__)
        inside = [
            each
            for each in frames
            if "importlib" not in each.filename and each.filename != __file__
        ]
        line = f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""
        cause = f"{type(error).__name__}: {error}{line}"
        raise ValueError(f"{dotted} is there but failed inside: {cause}") from None


def _not_there(dotted: str) -> str:
    folder, _, name = dotted.rpartition(".")
    if folder:  # imported already
        beside = pkgutil.iter_modules(vars(sys.modules[folder]).get("__path__", []))
        near = _near(name, [each.name for each in beside], f"{folder}.")
        return f"there is no module {dotted}{near}"
    return (
        f"there is no module {dotted} to import{_did_you_mean(dotted, ('fastssl', 'pipelines'))}"
        " (the folders of a checkout are imported from it: run there)"
    )


def _check(entries: dict[str, _Entry], schema: _Schema | None, errors: list[str]) -> dict[str, Any]:
    """The values, but for those in `errors`."""
    values = {}
    for key, entry in entries.items():
        if schema is not None and (key != "use" or schema.use is None):
            try:
                values[key] = _checked(key, entry, schema)
            except ValueError as error:
                errors.append(f"{entry.place}: {error}")
    return values


def _options(
    path: str | Path,
    section: str,
    schema: _Schema,
    entries: dict[str, _Entry],
    given: dict[str, Any],
    errors: list[str],
) -> Any:
    """The section's Options; None where a mistake was found, which `errors` has."""
    required = [
        field.name
        for field in fields(schema.options)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]
    examples = {int: "100", float: "0.1", bool: "true", str: "name"}
    for key in (key for key in required if key not in entries):
        hint = schema.types[key][0]
        example = examples.get(hint, (get_args(hint) or ["..."])[0])
        errors.append(f"{path}: {section}.{key}: missing; write for example '{key}: {example}'")
    if not {*required, *entries} - {"use"} <= given.keys():
        return None
    try:
        return schema.options(**given)
    except (ValueError, ArithmeticError) as error:
        named = [entries[key] for key in re.findall(r"\w+", str(error)) if key in entries]
        by_hand = any(entry.source == "command line" for entry in named)
        errors.append(f"{'command line' if by_hand else path}: {section}: {error}")
        return None


def _checked(key: str, entry: _Entry, schema: _Schema) -> Any:
    """The value, as the Options want it.

    Raises:
        ValueError: the key is unknown or the value has the wrong type.
    """
    if key not in schema.types:
        known = _near(key, schema.types)
        if schema.use is not None and schema.use.source != entry.source:
            known += f" (use: {schema.name} is from the {schema.use.source}, this key from the"
            known += f" {entry.source}: take it out there)"
        raise ValueError(f"unknown key{known}")
    value = _value(entry.node)
    hint, adapter = schema.types[key]
    try:
        checked = adapter.validate_python(value)
    except ValidationError:
        checked = MISSING
    # pydantic takes True and 1.0 for Literal[1]
    if type(checked) is type(value) or (type(value), type(checked)) == (int, float):
        return checked
    raise ValueError(
        f"expected {_described(hint)}, got {_shown(entry.node)}{_why(entry.node, hint)}"
    )


# What YAML 1.1 makes of it, and how to say so.


def _value(node: yaml.Node) -> Any:
    """The value written, lists as tuples.

    Raises:
        ValueError: nothing that a key takes, or a number that the writer can hardly have meant.
    """
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(each) for each in node.value)
    if isinstance(node, yaml.MappingNode):
        raise ValueError("expected a value, got keys of its own")
    text = node.value
    try:
        value = SafeConstructor().construct_object(node)
    except Exception:  # PyYAML lets any error out, for '2024-13-01' or '!!int x'
        raise ValueError(f"YAML cannot read it; write '{text}' in quotes") from None
    if type(value) in (int, float) and ":" in text:
        raise ValueError(f"YAML reads {text} in base 60: write {value}, or '{text}' in quotes")
    if (
        type(value) is int
        and re.fullmatch("[-+]?0[0-7_]+", text)
        and value != int(text.replace("_", ""))
    ):
        raise ValueError(
            f"YAML reads {text} as octal: write {int(text.replace('_', ''))}, or {value}"
        )
    return value


def _why(node: yaml.Node, hint: Any) -> str:
    """What to write instead, where YAML or a habit explains the wrong type."""
    kinds = _flat(hint)
    if isinstance(node, yaml.SequenceNode):
        wrong = [
            each
            for each in node.value
            if isinstance(each, yaml.ScalarNode) and type(_value(each)) not in kinds
        ]
        return _why_scalar(wrong[0], kinds) if wrong else ""
    if Ellipsis in get_args(hint) and type(_value(node)) in kinds:
        return f" (write [{node.value}])"
    return _why_scalar(node, kinds)


def _why_scalar(node: yaml.Node, kinds: list[Any]) -> str:
    value, text, plain = _value(node), node.value, _is_plain(node)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if isinstance(value, str) and (int in kinds or float in kinds):
        number = _number(text, float in kinds)
        how = f"YAML reads {text} as text" if plain else "in quotes it is text"
        return f" ({how}: write {number})" if number else ""
    if isinstance(value, str) and choices:
        return _did_you_mean(value, choices)
    if bool in kinds:
        return " (write true or false)"
    if type(value) is float and value.is_integer() and int in kinds:
        return f" (write {int(value)})"
    if type(value) is float and not math.isfinite(value):
        return " (must be finite)"
    if plain and value is not None and (str in kinds or text in choices):
        read = _yaml(value) if isinstance(value, bool) else type(value).__name__
        return f" (YAML reads {text} as {read}: write '{text}' in quotes)"
    if isinstance(value, bool) and text.lower() not in ("true", "false"):
        return f" (YAML reads {text} as {_yaml(value)})"
    return ""


def _number(text: str, fraction: bool) -> str | None:
    """The number in `text` as YAML 1.1 wants it: with a point, and a sign in the exponent."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or not (fraction or number.is_integer()):
        return None
    mantissa, e, exponent = text.lower().partition("e")
    if not fraction:
        return str(int(number))
    return f"{float(mantissa)}e{int(exponent):+d}" if e else _yaml(number)


def _flat(hint: Any) -> list[Any]:
    """The types that an annotation is made of."""
    if get_origin(hint) is Literal:
        return [hint]
    return [kind for part in get_args(hint) for kind in _flat(part)] or [hint]


def _described(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_described, parts))
    if get_origin(hint) is tuple and parts[-1] is Ellipsis:
        return f"a list of {_described(parts[0])}"
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(_described, parts))}]"
    return "null" if hint is NoneType else getattr(hint, "__name__", str(hint))


def _shown(node: yaml.Node) -> str:
    """What was written, on one line, shortened."""
    if _is_null(node):
        return "nothing (null)"
    if isinstance(node, yaml.MappingNode):
        return "keys"
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_shown, node.value))}]"
    text = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
    return repr(text) if node.tag.endswith(":str") else text


def _is_null(node: yaml.Node) -> bool:
    return node.tag.endswith(":null")


def _is_plain(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style


def _near(word: str, names: Iterable[str], prefix: str = "") -> str:
    known = ", ".join(f"{prefix}{name}" for name in names)
    return _did_you_mean(word, names, prefix) or (known and f"; known: {known}")


def _did_you_mean(word: str, names: Iterable[Any], prefix: str = "") -> str:
    by_lower = {str(name).lower(): str(name) for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean '{prefix}{by_lower[near[0]]}'?" if near else ""


def _dotted(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{section}.{key}": values[section][key] for section in values for key in values[section]
    }


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _yaml(value: Any) -> str:
    """The value in YAML, on one line."""
    style = '"' if "\n" in str(value) else None
    text = yaml.safe_dump(
        value, default_flow_style=True, default_style=style, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("...\n").strip()


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
