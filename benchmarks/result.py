"""What every command of the suite writes: rows of values, one a repeat, and where they come from.

One JSON schema for all: `python -m benchmarks compare` reads any two, `plot` draws from them, and
a key that is not declared here is refused.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from benchmarks import manifest
from benchmarks.manifest import Manifest, PageCache

SCHEMA_VERSION = 1


class Row(BaseModel):
    """One thing measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # "loader", "pil", "listing seconds", ...
    group: str = ""  # the recipe, the task, what grows; (group, name, extra's size) is unique
    unit: str  # "images/s", "s", "ms", "MB", ...; where not named in benchmarks.compare, no verdict
    values: Annotated[list[FiniteFloat], Field(min_length=1)]  # one a repeat, in the repeats' order
    cpu_ms: list[FiniteFloat] = []  # CPU milliseconds an image, one a repeat
    step_ms: dict[str, FiniteFloat] = {}  # p50 of one batch; p95 from 20 on, p99 from 100 on
    extra: dict[str, FiniteFloat | int | str | bool | None] = {}


class Result(BaseModel):
    """One run of a command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    benchmark: str  # the command
    settings: dict[str, JsonValue]
    rows: list[Row]
    conclusions: list[str]  # sentences
    manifest: Manifest


def make(
    benchmark: str,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    conclusions: Sequence[str] = (),
    *,
    data: Path | None = None,
    page_cache: PageCache | None = None,
    versions: Mapping[str, str] | None = None,
) -> Result:
    """A result measured just now.

    Args:
        benchmark: the command.
        rows: at least one.
        settings: what it was asked to do; paths become text, tuples lists.
        conclusions: what it means, in sentences.
        data: a path of the images, for the manifest.
        page_cache: "warm" after a reading pass, "cold" after `method.drop_from_cache`.
        versions: of packages that took part in another interpreter.
    """
    return Result(
        benchmark=benchmark,
        settings={key: _plain(value) for key, value in settings.items()},
        rows=list(rows),
        conclusions=list(conclusions),
        manifest=manifest.make(data, page_cache, versions),
    )


def write(path: Path, result: Result) -> None:
    """Writes the JSON, the folder with it.

    Raises:
        ValueError: it can't be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result.model_dump(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: can't be written: {error.strerror}") from error


def read(path: Path) -> Result:
    """The result in a file.

    Raises:
        ValueError: it can't be read, or is no result of this suite; names the file, the key and
            the remedy.
    """
    remedy = "write one with `python -m benchmarks COMMAND --out FILE.json`"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ValueError(f"{path}: can't be read ({reason}): {remedy}") from error
    try:
        return Result.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = f"{path}: {key}" if key else str(path)
        raise ValueError(
            f"{where}: {first['msg']}: not a result of schema {SCHEMA_VERSION}; {remedy}"
        ) from error


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown: median (least - most); columns that no row fills are left out."""
    steps = sorted({name for row in rows for name in row.step_ms})
    extras = list(dict.fromkeys(name for row in rows for name in row.extra))
    columns: list[tuple[str, list[str]]] = [
        ("group", [row.group for row in rows]),
        ("name", [row.name for row in rows]),
        ("value", [f"{spread(row.values)} {row.unit}" for row in rows]),
        ("CPU ms/image", [spread(row.cpu_ms) if row.cpu_ms else "" for row in rows]),
    ]
    columns += [
        (f"{step} ms", [number(row.step_ms[step]) if step in row.step_ms else "" for row in rows])
        for step in steps
    ]
    columns += [(name, [_cell(row.extra.get(name)) for row in rows]) for name in extras]
    filled = [(title, cells) for title, cells in columns if any(cells)]
    lines = [" | ".join(title for title, _ in filled), "|".join("---" for _ in filled)]
    lines += [" | ".join(each) for each in zip(*(cells for _, cells in filled), strict=True)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Median (least - most), or the only value."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))} - {number(max(values))})"


def number(value: float) -> str:
    """Three digits that tell something, and no more than there are before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    """As JSON knows it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
