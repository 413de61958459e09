"""What a recipe and the command line say, key by key with its place: YAML without its traps.

Stricter than YAML, in which a key may be given twice and an alias may hold itself. A value stays a
YAML node, which still knows how it was written, until fastssl/recipe_check.py compares it with what
its key takes.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor


class RecipeError(ValueError):
    """A mistake in a recipe, its input or the run folder; the message is all that the user sees."""


class Entry(NamedTuple):
    """What was written for a key."""

    node: yaml.Node
    place: str  # "recipes/pirl.yaml: optim.lr"
    source: str  # "recipe", "demo", "command line" or "weights"


Layer = dict[str, dict[str, Entry]]  # section -> key -> what was written; has every section


def read_file(
    path: str | Path, sections: Collection[str], errors: list[str]
) -> tuple[Layer, Layer]:
    """The recipe's own sections, and those under demo; mistakes in keys are added to `errors`.

    Raises:
        RecipeError: the file cannot be read or is not YAML.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text from byte {error.start} on") from None
    except OSError as error:
        there = sorted({*Path(path).parent.glob("*.yaml"), *Path("recipes").glob("*.yaml")})
        found = near(str(path), [str(each) for each in there])
        raise RecipeError(f"{path}: {error.strerror}{found}") from None
    root = _compose(text, str(path))
    if not isinstance(root, yaml.MappingNode):
        found = "an empty file" if root is None else shown(root)
        raise RecipeError(f"{path}: expected sections such as 'data:', got {found}")
    demos = [node for key, node in root.value if key.value == "demo"]
    return (
        _read_sections(root, f"{path}: ", "recipe", sections, errors),
        _read_sections(demos[0] if demos else None, f"{path}: demo.", "demo", sections, errors),
    )


def read_overrides(overrides: Sequence[str], sections: Collection[str], errors: list[str]) -> Layer:
    """What the command line says. Of two equal keys the last holds, as in other commands."""
    layer: Layer = {section: {} for section in sections}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, _, key = name.partition(".")
        place, text = f"command line: {name or repr(override)}", text.strip()
        if section == "demo":
            errors.append(
                f"{place}: only a file has a demo section; write for example train.epochs=1"
            )
        elif section not in layer:
            errors.append(f"{place}: unknown section {section!r}{near(section, sections)}")
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
            if node is None or (is_plain(node) and node.value != text):
                found = "nothing" if node is None else repr(node.value)
                errors.append(f"{place}: of {text!r} YAML reads {found}; write '{text}' in quotes")
            else:
                layer[section][key] = Entry(node, place, "command line")
    return layer


def value(node: yaml.Node) -> Any:
    """The value that YAML 1.1 reads, lists as tuples.

    Raises:
        ValueError: nothing that a key takes, or a number that the writer can hardly have meant.
    """
    if isinstance(node, yaml.SequenceNode):
        return tuple(value(each) for each in node.value)
    if isinstance(node, yaml.MappingNode):
        raise ValueError("expected a value, got keys of its own")
    text = node.value
    try:
        read = SafeConstructor().construct_object(node)
    except Exception:  # PyYAML lets any error out, for '2024-13-01' or '!!int x'
        raise ValueError(f"YAML cannot read it; write '{text}' in quotes") from None
    if type(read) in (int, float) and ":" in text:
        raise ValueError(f"YAML reads {text} in base 60: write {read}, or '{text}' in quotes")
    if type(read) is int and re.fullmatch("[-+]?0[0-7_]+", text):
        decimal = int(text.replace("_", ""))
        if read != decimal:
            raise ValueError(f"YAML reads {text} as octal: write {decimal}, or {read}")
    return read


def is_null(node: yaml.Node) -> bool:
    return node.tag.endswith(":null")


def is_plain(node: yaml.Node) -> bool:
    """Whether it is one value, without quotes."""
    return isinstance(node, yaml.ScalarNode) and not node.style


# How a message says it.


def shown(node: yaml.Node) -> str:
    """What was written, on one line, shortened."""
    if is_null(node):
        return "nothing (null)"
    if isinstance(node, yaml.MappingNode):
        return "keys"
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(shown, node.value))}]"
    text = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
    return repr(text) if node.tag.endswith(":str") else text


def in_yaml(plain: Any) -> str:
    """A value of plain types in YAML, on one line."""
    style = '"' if "\n" in str(plain) else None
    text = yaml.safe_dump(
        plain, default_flow_style=True, default_style=style, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("...\n").strip()


def near(word: str, names: Iterable[str], prefix: str = "") -> str:
    """The name that was meant, else all of them, to end a message with."""
    known = ", ".join(f"{prefix}{name}" for name in names)
    return did_you_mean(word, names, prefix) or (known and f"; known: {known}")


def did_you_mean(word: str, names: Iterable[Any], prefix: str = "") -> str:
    by_lower = {str(name).lower(): str(name) for name in names}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean '{prefix}{by_lower[close[0]]}'?" if close else ""


# YAML's syntax, before types.


def _read_sections(
    root: yaml.Node | None, where: str, source: str, sections: Collection[str], errors: list[str]
) -> Layer:
    layer: Layer = {section: {} for section in sections}
    for section, node in _items(root, where, errors):
        if section in layer:
            for key, written in _items(node, f"{where}{section}.", errors):
                layer[section][key] = Entry(written, f"{where}{section}.{key}", source)
        elif (section, source) != ("demo", "recipe"):
            errors.append(f"{where}{section}: unknown section{near(section, sections)}")
    return layer


def _items(
    node: yaml.Node | None, where: str, errors: list[str]
) -> Iterator[tuple[str, yaml.Node]]:
    """The keys of a mapping. Of two equal ones, PyYAML would silently take the last."""
    place = where.rstrip(".: ")
    if node is None or is_null(node):
        return
    if not isinstance(node, yaml.MappingNode):
        errors.append(f"{place}: expected keys (as in 'key: value'), got {shown(node)}")
        return
    seen = set()
    for key, written in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not key.tag.endswith(":str"):
            errors.append(f"{place}: {line}: expected a word as key, got {shown(key)}")
        elif not key.value.isidentifier():
            errors.append(f"{place}: {line}: expected 'key: value', got {shown(key)} for a key")
        elif key.value in seen:
            errors.append(f"{where}{key.value}: given a second time in {line}; keep one")
        else:
            seen.add(key.value)
            yield key.value, written


def _compose(text: str, place: str) -> yaml.Node | None:
    """None for an empty text.

    Raises:
        RecipeError: it is not YAML, or has an alias, which may hold itself.
    """
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
    if aliases:
        line = aliases[0].start_mark.line + 1
        raise RecipeError(f"{place}: line {line}: *{aliases[0].anchor}: write the value itself")
    return root
