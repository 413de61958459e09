"""Probe lines of several runs, brought together: what is a setting, a result, a depth, a series.

A probe writes {"step", "probe", results and settings of any name}. Nothing here knows a probe: the
settings that tell its lines apart are found by looking, so that a new probe needs no edit.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from fastssl.reporting.charts import Series, Unit

# Parts of a key (between underscores) that make it a result: first those that say how good the
# features are, in parts of 1, then others.
_GOODNESS = re.compile(
    r"accuracy|accuracies|map|ap\d*|ap[sml]|ar\d*|ar[sml]|top\d*|precision|recall"
)
_OTHER_RESULT = re.compile(
    r"loss|error|std|spread|seconds|rank|distance|correlation|mean|variance|ratio|dead"
)
# Fractions are results too, if they are not called so.
_SETTING = re.compile(
    r"lr|rate|decay|l2|c|cost|temperature|fraction|dropout|momentum|gamma|lambda|alpha|smoothing"
    r"|tolerance|scale|scaling|weight|threshold|iou"
)
_LONG = 8  # values in a list, from which on it is no setting


@dataclass(frozen=True)
class Row:
    """What was measured at one stage with one choice of settings."""

    stage: str  # empty: the probe has none
    settings: str  # those that the probe's lines do not all share
    values: dict[str, dict[int, tuple[Any, int]]]  # result -> run -> last value, step of weights

    def unit(self, result: str) -> Unit:
        """Of its numbers."""
        return unit_of(result, [value for value, _ in self.values[result].values()])


@dataclass(frozen=True)
class Probe:
    """All that is known of one probe."""

    name: str
    shared: str  # settings that are the same in all its lines
    results: list[str]  # keys, the main one first; at least one
    rows: list[Row]


@dataclass(frozen=True)
class Measured:
    """The last line of a probe at one stage with one choice of settings."""

    probe: str
    step: int
    results: dict[str, Any]  # at least one, but of a line without numbers
    settings: dict[str, Any]  # `stage` first, where there is one


@dataclass(frozen=True)
class Drawn:
    """What a chart shows of a probe."""

    title: str
    unit: Unit
    series: list[Series]
    labels: list[str]  # stages; empty: x is the step
    note: str


def unit_of(key: str, values: Sequence[Any]) -> Unit:
    """Accuracies and precisions in parts of 1 are shown in per cent."""
    numbers = [float(value) for value in values if is_number(value)]
    finite = [value for value in numbers if math.isfinite(value)]
    return "%" if _named(key, _GOODNESS) and all(0 <= value <= 1 for value in finite) else ""


def is_number(value: Any) -> TypeGuard[float]:
    """A number that a float can hold; true and false are none."""
    return type(value) is float or (type(value) is int and abs(value) < 1e300)


def measured(runs: Sequence[list[dict[str, Any]]]) -> list[Probe]:
    """The last value of everything that was measured, in the order of first appearance.

    Args:
        runs: the probe lines of each run.
    """
    probes = []
    for name in _names(runs):
        keys, fixed = separating(name, runs), _constant(name, runs)
        shared = {key for key in fixed if all(key in line for line in _lines(name, runs))}
        rows: dict[tuple[str, str], Row] = {}
        results = {_main_result(name, runs): None}
        for number, lines in enumerate(runs):
            for line in lines:
                if line["probe"] != name:
                    continue
                told = {k: v for k, v in line.items() if k in (keys | fixed) - shared}
                place = (_stage(line), _settings(told))
                values = rows.setdefault(place, Row(*place, {})).values
                for key in _rest(line, keys | fixed) or [""]:
                    results[key] = None
                    before = values.setdefault(key, {}).get(number)
                    if before is None or before[1] <= line["step"]:
                        values[key][number] = (line.get(key, ""), line["step"])
        used = [key for key in results if any(key in row.values for row in rows.values())]
        probes.append(Probe(_text(name), _note(name, runs), used, list(rows.values())))
    return probes


def last_of_each(lines: list[dict[str, Any]]) -> list[Measured]:
    """The probes of one run: for each stage and choice of settings the line that was written last.

    Args:
        lines: its probe lines. Lists of many values are left out.
    """
    found: list[Measured] = []
    for name in _names([lines]):
        main, keys = _main_result(name, [lines]), {"stage"} | separating(name, [lines])
        last: dict[str, Measured] = {}
        for line in _lines(name, [lines]):
            told = {k: v for k, v in line.items() if _is_free(k)}
            told = {k: v for k, v in told.items() if isinstance(v, dict) or not _bulky(v)}
            results = {k: v for k, v in told.items() if k == main or _is_result(k)}
            settings = {k: line[k] for k in line if k == "stage"}
            settings |= {k: v for k, v in told.items() if k not in results}
            apart = {k: v for k, v in settings.items() if k in keys or isinstance(v, dict)}
            place = json.dumps(apart, sort_keys=True)
            last[place] = Measured(_text(name), line["step"], results, settings)
        found += last.values()
    return found


def over_steps(runs: Sequence[list[dict[str, Any]]], names: Sequence[str]) -> list[Drawn]:
    """For each probe that was made at several steps: its main result over them.

    Where a run has several settings, the one measured most often is drawn.
    """
    drawn = []
    for probe in _names(runs):
        keys = separating(probe, runs)
        series, notes = [], []
        result = _main_result(probe, runs)
        for number, lines in enumerate(runs):
            groups: dict[str, dict[int, float]] = {}
            for line in lines:
                if line["probe"] == probe and is_number(line.get(result)):
                    told = {k: v for k, v in line.items() if k in keys}
                    place = ", ".join(filter(None, (_stage(line), _settings(told))))
                    groups.setdefault(place, {})[line["step"]] = float(line[result])
            if not groups:
                continue
            place, points = max(groups.items(), key=lambda each: len(each[1]))
            if place:
                notes.append(f"{names[number]}: {place}")
            series.append(Series(names[number], number, sorted(points.items())))
        if any(len(each.points) > 1 for each in series):
            unit = unit_of(result, [value for each in series for _, value in each.points])
            note = "; ".join([_note(probe, runs), *notes]) if notes else _note(probe, runs)
            drawn.append(Drawn(f"{_text(probe)}: {result}", unit, series, [], note))
    return drawn


def by_depth(runs: Sequence[list[dict[str, Any]]], names: Sequence[str]) -> list[Drawn]:
    """For each probe with stages, and each of its settings: the main result at every depth."""
    drawn = []
    for probe in _names(runs):
        keys = separating(probe, runs)
        result = _main_result(probe, runs)
        groups: dict[str, dict[int, dict[str, tuple[int, float]]]] = {}
        stages: dict[str, None] = {}
        for number, lines in enumerate(runs):
            for line in lines:
                if line["probe"] != probe or "stage" not in line or not is_number(line.get(result)):
                    continue
                stage = _stage(line)
                stages[stage] = None
                told = _settings({k: v for k, v in line.items() if k in keys})
                values = groups.setdefault(told, {}).setdefault(number, {})
                if stage not in values or values[stage][0] <= line["step"]:
                    values[stage] = (line["step"], float(line[result]))
        for told, of_runs in groups.items():
            labels = [each for each in stages if any(each in values for values in of_runs.values())]
            if len(labels) < 2:
                continue
            series = [
                Series(
                    names[number],
                    number,
                    [
                        (labels.index(stage), values[stage][1])
                        for stage in labels
                        if stage in values
                    ],
                )
                for number, values in of_runs.items()
            ]
            unit = unit_of(result, [value for each in series for _, value in each.points])
            title = f"{_text(probe)}: {result} by depth"
            note = "; ".join(filter(None, (told, _note(probe, runs))))
            drawn.append(Drawn(title, unit, series, labels, note))
    return drawn


def separating(probe: Any, runs: Sequence[list[dict[str, Any]]]) -> set[str]:
    """The settings of a probe by which its lines of one run, step and stage are told apart.

    A key is one of them if without it two lines that differ in their settings would look the same.
    Numbers are tried first: a strength that was chosen for each stage is no setting beside a
    solver that was asked for.
    """
    lines = [(number, line) for number, all_ in enumerate(runs) for line in all_]
    lines = [(number, line) for number, line in lines if line["probe"] == probe]
    keys = {key for _, line in lines for key in _settings_of(line)}
    order = sorted(keys, key=lambda key: (_kind([line.get(key) for _, line in lines]), key))

    def told_apart(by: set[str]) -> int:
        return len(
            {
                (number, line["step"], _stage(line), *(_text(line.get(key)) for key in sorted(by)))
                for number, line in lines
            }
        )

    whole = told_apart(keys)
    for key in order:
        if told_apart(keys - {key}) == whole:
            keys = keys - {key}
    return keys


def _settings_of(line: dict[str, Any]) -> set[str]:
    """What may tell two lines apart: no result by its name, and nothing bulky."""
    return {key for key in line if _is_free(key) and not _is_result(key) and not _bulky(line[key])}


def _rest(line: dict[str, Any], without: set[str]) -> list[str]:
    """What is shown as a value of its own: results, and what changes along with them."""
    return [key for key in line if _is_free(key) and key not in without]


def _constant(probe: Any, runs: Sequence[list[dict[str, Any]]]) -> set[str]:
    """Settings that are the same in all lines of the probe that have them."""
    lines = _lines(probe, runs)
    keys = {key for line in lines for key in _settings_of(line)}
    return {
        key
        for key in keys
        if len({_text(line[key]) for line in lines if key in line}) == 1
        and (_named(key, _SETTING) or not any(type(line.get(key)) is float for line in lines))
    }


def _note(probe: Any, runs: Sequence[list[dict[str, Any]]]) -> str:
    """The settings that all lines of the probe share."""
    lines = _lines(probe, runs)
    fixed = {key for key in _constant(probe, runs) if all(key in line for line in lines)}
    return _settings({key: value for key, value in lines[0].items() if key in fixed})


def _main_result(probe: Any, runs: Sequence[list[dict[str, Any]]]) -> str:
    """The key that says how good the features are, else the first fraction, else a number."""
    lines = _lines(probe, runs)
    keys = dict.fromkeys(key for line in lines for key in line if _is_free(key))
    numbers = [key for key in keys if any(is_number(line.get(key)) for line in lines)]
    good = [key for key in numbers if _named(key, _GOODNESS)]
    settings = separating(probe, runs) | _constant(probe, runs)
    free = [key for key in numbers if key not in settings]
    fractions = [key for key in free if any(type(line.get(key)) is float for line in lines)]
    return next(iter([*good, *fractions, *free, *numbers]), "")


def _lines(probe: Any, runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [line for lines in runs for line in lines if line["probe"] == probe]


def _is_free(key: str) -> bool:
    return key not in ("step", "probe", "stage")


def _is_result(key: str) -> bool:
    return _named(key, _GOODNESS) or _named(key, _OTHER_RESULT)


def _named(key: str, words: re.Pattern[str]) -> bool:
    return any(words.fullmatch(part) for part in key.lower().split("_"))


def _bulky(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and len(value) > _LONG)


def _kind(values: Sequence[Any]) -> int:
    """Fractions, then whole numbers, then words and lists."""
    if any(type(value) is float for value in values):
        return 0
    return 1 if any(type(value) is int for value in values) else 2


def _names(runs: Sequence[list[dict[str, Any]]]) -> list[Any]:
    """Every probe, in the order of first appearance."""
    found = []
    for lines in runs:
        for line in lines:
            if line["probe"] not in found:
                found.append(line["probe"])
    return found


def _stage(line: dict[str, Any]) -> str:
    return _text(line["stage"]) if "stage" in line else ""


def _settings(settings: dict[str, Any]) -> str:
    """In words: "neighbours 20, solver lbfgs"."""
    return ", ".join(f"{key} {_text(settings[key])}" for key in settings)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
