"""Checks what a section of a recipe says against its Options, and says what to write instead.

Options are a dataclass of plain types. Strict: an int is fine for a float, and nothing else is for
anything else: not '1e-4', which YAML 1.1 reads as text, nor true for 1. No NaN, no infinity.
"""

import importlib
import math
import pkgutil
import re
import sys
import traceback
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from fastssl.recipe_text import Entry, did_you_mean, in_yaml, is_plain, near, shown, value


class Schema(NamedTuple):
    """What a section may say."""

    name: str  # of the module, or of the section
    module: ModuleType | None
    use: Entry | None  # what names the module
    options: Any  # the dataclass
    types: dict[str, tuple[Any, TypeAdapter[Any]]]  # key -> annotation, and what checks it


def schema_of_settings(section: str, options: Any) -> Schema:
    """For a section that is always of the same Options."""
    return Schema(section, None, None, options, _types(options))


def schema_of_part(section: str, use: Entry, needs: tuple[str, ...], example: str) -> Schema:
    """For a section whose Options are those of the module that `use` names.

    Args:
        section: its name.
        use: what was written for the module.
        needs: what the module must offer, Options among it.
        example: the dotted name of one that does.

    Raises:
        ValueError: there is no such module, it fails, or it lacks something.
    """
    dotted = value(use.node)
    module = _import(dotted, example)
    if absent := [name for name in needs if name not in vars(module)]:
        raise ValueError(f"{dotted} has no {', '.join(absent)}; {section} needs {', '.join(needs)}")
    return Schema(dotted, module, use, module.Options, _types(module.Options))


def check(entries: dict[str, Entry], schema: Schema | None, errors: list[str]) -> dict[str, Any]:
    """The values, but for those in `errors`; none without a schema."""
    values = {}
    for key, entry in entries.items():
        if schema is not None and (key != "use" or schema.use is None):
            try:
                values[key] = _checked(key, entry, schema)
            except ValueError as error:
                errors.append(f"{entry.place}: {error}")
    return values


def make(
    path: str | Path,
    section: str,
    schema: Schema,
    entries: dict[str, Entry],
    values: dict[str, Any],
    errors: list[str],
) -> Any:
    """The section's Options.

    Args:
        path: of the recipe.
        section: its name.
        schema: its.
        entries: what was written for it.
        values: those of the entries that are right, as `check` gave them.
        errors: what is missing, and what the Options refuse, is added.

    Returns:
        None where a mistake was found, here or by `check`.
    """
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
    if not {*required, *entries} - {"use"} <= values.keys():
        return None
    try:
        return schema.options(**values)
    except (ValueError, ArithmeticError) as error:
        keys = [key for key in re.findall(r"\w+", str(error)) if key in entries]
        sources = [entries[key].source for key in keys]
        where = "command line" if "command line" in sources else path
        remedy = ""
        if keys and schema.use is not None and schema.use.source == "command line" != where:
            remedy = f" (from the {sources[0]}: give {section}.{keys[0]}=... for {schema.name})"
        errors.append(f"{where}: {section}: {error}{remedy}")
        return None


# The module, and the types of its Options.


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
        meant = near(name, [each.name for each in beside], f"{folder}.")
        return f"there is no module {dotted}{meant}"
    return (
        f"there is no module {dotted} to import{did_you_mean(dotted, ('fastssl', 'pipelines'))}"
        " (the folders of a checkout are imported from it: run there)"
    )


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


# One value.


def _checked(key: str, entry: Entry, schema: Schema) -> Any:
    """The value, as the Options want it.

    Raises:
        ValueError: the key is unknown or the value has the wrong type.
    """
    if key not in schema.types:
        known = near(key, schema.types)
        if schema.use is not None and schema.use.source != entry.source:
            known += f" (use: {schema.name} is from the {schema.use.source}, this key from the"
            known += f" {entry.source}: take it out there)"
        raise ValueError(f"unknown key{known}")
    read = value(entry.node)
    hint, adapter = schema.types[key]
    try:
        checked = adapter.validate_python(read)
    except ValidationError:
        checked = MISSING
    # pydantic takes True and 1.0 for Literal[1]
    if type(checked) is type(read) or (type(read), type(checked)) == (int, float):
        for each in checked if isinstance(checked, tuple) else (checked,):
            _refuse_text_that_names_nothing(key, each)
        return checked
    raise ValueError(
        f"expected {_described(hint)}, got {shown(entry.node)}{_why(entry.node, hint)}"
    )


def _refuse_text_that_names_nothing(key: str, given: Any) -> None:
    if not isinstance(given, str):
        return
    if "\0" in given:
        raise ValueError(f"{given!r} has a NUL character, as no file and no name may: take it out")
    if given.isspace() or (key, given) == ("root", ""):  # which would be the folder one is in
        raise ValueError(f"{given!r} is blank: write a name, or leave the key out")


def _why(node: yaml.Node, hint: Any) -> str:
    """What to write instead, where YAML or a habit explains the wrong type."""
    kinds = _flat(hint)
    if isinstance(node, yaml.SequenceNode):
        scalars = [each for each in node.value if isinstance(each, yaml.ScalarNode)]
        wrong = [each for each in scalars if type(value(each)) not in kinds]
        return _why_scalar(wrong[0], kinds) if wrong else ""
    if Ellipsis in get_args(hint) and type(value(node)) in kinds:
        return f" (write [{node.value}])"
    return _why_scalar(node, kinds)


def _why_scalar(node: yaml.Node, kinds: list[Any]) -> str:
    read, text, plain = value(node), node.value, is_plain(node)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if isinstance(read, str) and (int in kinds or float in kinds):
        number = _number(text, float in kinds)
        how = f"YAML reads {text} as text" if plain else "in quotes it is text"
        return f" ({how}: write {number})" if number else ""
    if isinstance(read, str) and choices:
        return did_you_mean(read, choices)
    if bool in kinds:
        return " (write true or false)"
    if type(read) is float and read.is_integer() and int in kinds:
        return f" (write {int(read)})"
    if type(read) is float and not math.isfinite(read):
        return " (must be finite)"
    if plain and read is not None and (str in kinds or text in choices):
        found = in_yaml(read) if isinstance(read, bool) else type(read).__name__
        return f" (YAML reads {text} as {found}: write '{text}' in quotes)"
    if isinstance(read, bool) and text.lower() not in ("true", "false"):
        return f" (YAML reads {text} as {in_yaml(read)})"
    return ""


def _number(text: str, fraction: bool) -> str | None:
    """The number in `text` as YAML 1.1 wants it: with a point, and a sign in the exponent."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or not (fraction or number.is_integer()):
        return None
    if not fraction:
        return str(int(number))
    mantissa, e, exponent = text.lower().partition("e")
    return f"{float(mantissa)}e{int(exponent):+d}" if e else in_yaml(number)


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
