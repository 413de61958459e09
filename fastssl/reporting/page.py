"""The page of a report: its sections, top to bottom, from runs that were read already."""

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from fastssl import config
from fastssl.journal import WAITING, WARM_UP
from fastssl.recipe_text import in_yaml
from fastssl.reporting import probes as report_probes
from fastssl.reporting.charts import (
    Series,
    Unit,
    chart,
    folded_legend,
    run_swatch,
    shown,
)
from fastssl.reporting.markup import Child, Markup, element, folded, join, table
from fastssl.reporting.pictures import Picture
from fastssl.reporting.probes import Probe, Row, is_number
from fastssl.reporting.run import Run
from fastssl.reporting.style import SCRIPT, STYLE


class Curve(NamedTuple):
    """What is drawn of the training lines."""

    key: str
    title: str
    unit: Unit = ""
    from_zero: bool = False  # the axis of values begins at 0


CURVES = (
    Curve("loss", "Loss"),
    Curve("accuracy", "", "%", True),  # its title: _accuracy
    Curve("lr", "Learning rate", "", True),
    Curve("std", "Std of embeddings (0: collapsed)", "", True),
    Curve("images_per_second", "Throughput, images/s", "images/s", True),
    Curve("data_wait", "Waiting for images, % of the time", "%", True),
)
UNDRAWN = ("step", "epoch", "chance", "patches_per_second")
MOST_OTHERS = 12  # charts of metrics that are not in CURVES
MOST_VALUE = 4000  # characters of a list that a probe wrote
MOST_DIFF = 60_000  # characters of a commit's diff
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    runs: Sequence[Run],
    previews: Mapping[str, Picture | str],
    drawn: Mapping[str, tuple[list[Picture], list[str]]],
    *,
    made: str,
) -> str:
    """The whole HTML file.

    Args:
        runs: at least one.
        previews: of each run by name: its picture, or why there is none. Empty: none was asked for.
        drawn: of each run by name: the pictures of its evaluations, and what could not be shown.
        made: when, and by what.
    """
    title = "fastssl report: " + ", ".join(run.name for run in runs[:4])
    title += f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    sections = [
        ("runs", "Runs", _runs(runs)),
        ("curves", "Curves", _curves(runs)),
        ("probes", "Probes", _probes(runs)),
        ("pictures", "Pictures from evaluations", _evaluations(runs, drawn)),
        ("input", "What the network sees", _previews(runs, previews)),
        ("throughput", "Throughput and stall", _throughput(runs)),
        ("recipe", "Recipe as run", _recipe(runs)),
        ("environment", "Environment", _environment(runs)),
    ]
    sections = [(key, name, body) for key, name, body in sections if body]
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("title", {}, title),
        element("style", {}, Markup(STYLE)),
    )
    body = element(
        "body",
        {},
        element(
            "header",
            {},
            element(
                "h1", {}, "Report of " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
            ),
            element("p", {"class": "soft"}, made),
            element(
                "nav",
                {"aria-label": "sections"},
                *[element("a", {"href": f"#{key}"}, name) for key, name, _ in sections],
            ),
        ),
        element(
            "main",
            {},
            *[
                element("section", {"id": key}, element("h2", {}, name), content)
                for key, name, content in sections
            ],
        ),
        element("script", {}, Markup(SCRIPT)),
    )
    return "<!DOCTYPE html>\n" + element("html", {"lang": "en"}, head, body) + "\n"


def hours(run: Run) -> float | None:
    """Of training, by the log: images over images/s, line by line; probes and pauses are not in."""
    spans = _spans(run)
    return sum(seconds for _, _, seconds in spans) / 3600 if spans else None


# Runs.


def _runs(runs: Sequence[Run]) -> Markup:
    rows = []
    for number, run in enumerate(runs):
        kind = run.state.split()[0]
        time = hours(run)
        start = str(run.starts[0].get("time", "unknown")) if run.starts else "unknown"
        again = f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
        rows.append(
            [
                join([run_swatch(number), run.name]),
                element("td", {"class": f"whole {kind}"}, run.progress),
                run.task,
                _whole(run.backbone),
                run.data,
                _whole(start.replace("T", " ").replace("Z", " UTC") + again),
                _whole("none yet" if time is None else _duration(time)),
                _whole(_commit(run)),
            ]
        )
    head = ("run", "state", "task", "backbone", "data", "started", "training", "commit")
    notes = [
        element("p", {"class": "warn"}, f"{run.name}: {note}") for run in runs for note in run.notes
    ]
    return join(
        [
            *notes,
            table(
                head,
                rows,
                "States as this page was made; time of training by the log, without probes",
            ),
            _results(runs),
        ]
    )


def _whole(text: str) -> Markup:
    """A cell in one line."""
    return element("td", {"class": "whole"}, text)


def _duration(time: float) -> str:
    return f"{time:.3g} h" if time >= 1 else f"{time:.2g} h ({60 * time:.2g} min)"


def _results(runs: Sequence[Run]) -> Markup:
    """Where each run stands: the last value of what it logs, on val, and kNN before and after."""
    curves = [curve for curve in CURVES if curve.key in ("loss", "accuracy", "std")]
    learn = any(run.learns_classes for run in runs)
    rows = []
    for number, run in enumerate(runs):
        last = run.lines[-1] if run.lines else {}
        # Those of training: evaluations write lines of their own, with a stage.
        knn = [x for x in run.probes if x["probe"] == "knn" and "stage" not in x]
        knn = [x for x in knn if is_number(x.get("accuracy"))]
        knn = [x for x in knn if x.get("neighbours") == knn[0].get("neighbours")]
        val = [x for x in run.probes if x["probe"] == "val" and is_number(x.get("accuracy"))]
        cells = [_cell(last.get(curve.key), curve.unit) for curve in curves]
        cells.insert(2, _cell(last.get("chance"), "%"))
        for one in (*([val[-1:]] if learn else []), knn[:1], knn[-1:] if len(knn) > 1 else []):
            under = f"step {one[0]['step']:,}" if one else ""
            cells.append(_cell(one[0]["accuracy"] if one else None, "%", under))
        rows.append([join([run_swatch(number), run.name]), *cells])
    if not any(run.lines or run.probes for run in runs):
        return Markup("")
    accuracy, val = _accuracy(runs).lower(), ["val, last"] if learn else []
    head = ("run", "loss", accuracy, "chance", "std", *val, "kNN, first", "kNN, last")
    caption = "Last line of training, first and last kNN probe"
    if learn:
        caption += "; val: of the classes that were learnt, on images that were not trained on"
    return table(head, rows, caption, numbers=True)


def _accuracy(runs: Sequence[Run]) -> str:
    """What `accuracy` of the training lines is of; a run with labels has no pretext task."""
    learn = any(run.learns_classes for run in runs)
    return "Accuracy in training" if learn else "Pretext accuracy"


def _commit(run: Run) -> str:
    commits = [str(start.get("commit") or "")[:10] for start in run.starts]
    commits = [commit for commit in dict.fromkeys(commits) if commit]
    changed = any(start.get("diff") for start in run.starts)
    return (", ".join(commits) or "unknown") + (" with changes" if changed and commits else "")


# Curves.


def _curves(runs: Sequence[Run]) -> Markup:
    if not any(run.lines for run in runs):
        return element("p", {}, "No line of training is logged yet.")
    known = {curve.key for curve in CURVES}
    found = {key for run in runs for line in run.lines for key in line if is_number(line[key])}
    others = sorted(found - known - {*UNDRAWN})
    wanted = [curve for curve in CURVES if curve.key in found]
    wanted += [Curve(key, key) for key in others[:MOST_OTHERS]]
    charts = []
    for key, title, unit, from_zero in wanted:
        series = [
            Series(run.name, number, points)
            for number, run in enumerate(runs)
            if (points := _points(run, key))
        ]
        if key == "accuracy":
            title = f"{_accuracy(runs)} (dotted: chance)"
            series += [
                Series(f"chance, {run.name}", number, points, chance=True)
                for number, run in enumerate(runs)
                if (points := _points(run, "chance"))
            ]
        charts.append(chart(title, series, unit=unit, from_zero=from_zero))
    notes = []
    if len(runs) > 1 and len({run.task for run in runs}) > 1:
        text = "Losses and accuracies in training of different tasks are not to be compared."
        notes.append(element("p", {"class": "soft"}, text))
    if others[MOST_OTHERS:]:
        text = f"Not drawn: {', '.join(others[MOST_OTHERS:])}; see the values."
        notes.append(element("p", {"class": "soft"}, text))
    names = [run.name for run in runs]
    return join(
        [
            *notes,
            folded_legend(names, [("chance", "chance")] if "chance" in found else []),
            element("div", {"class": "charts"}, *charts),
            *[_values(run, max(20, 200 // len(runs))) for run in runs if run.lines],
        ]
    )


def _points(run: Run, key: str) -> list[tuple[float, float]]:
    return [(line["step"], float(line[key])) for line in run.lines if is_number(line.get(key))]


def _values(run: Run, most: int) -> Markup:
    """The lines themselves: all, or some of them at even distances, the first and last included."""
    count = len(run.lines)
    if count <= most:
        chosen, told = run.lines, f"all {count:,} lines"
    else:
        places = [round(number * (count - 1) / (most - 1)) for number in range(most)]
        chosen, told = [run.lines[place] for place in places], f"{most} of {count:,} lines"
    keys = list(dict.fromkeys(key for line in chosen for key in line if key != "step"))
    rows = [[f"{line['step']:,}", *[_cell(line.get(key), "") for key in keys]] for line in chosen]
    caption = f"{run.name}: {told} of training"
    return folded(f"Values: {caption}", table(["step", *keys], rows, caption, numbers=True))


def _cell(value: Any, unit: Unit, under: str = "") -> Markup:
    """A number as people read it; as it was logged in `title`."""
    if value is None:
        return element("td", {}, "\N{EN DASH}")
    logged = json.dumps(value)
    if isinstance(value, list | dict) and len(logged) > 40:
        code = element(
            "code", {}, logged[:MOST_VALUE] + ("" if len(logged) <= MOST_VALUE else " ...")
        )
        return element("td", {"class": "text"}, folded(f"{len(value)} values", code))
    text = shown(float(value), unit) if is_number(value) else _plain(value)
    attributes = {"title": logged} if is_number(value) else {}
    small = [element("small", {}, under)] if under else []
    return element("td", attributes, text, *small)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# Probes.


def _probes(runs: Sequence[Run]) -> Markup:
    lines = [run.probes for run in runs]
    names = [run.name for run in runs]
    if not any(lines):
        return element("p", {}, "No probe is logged yet.")
    depth = report_probes.by_depth(lines, names)
    steps = report_probes.over_steps(lines, names)
    charts = [
        chart(
            each.title,
            each.series,
            unit=each.unit,
            labels=each.labels,
            x_title="depth, from the input on" if each.labels else "optimizer step",
            from_zero=each.unit == "%",
            note=each.note,
        )
        for each in [*steps, *depth][:MOST_OTHERS]
    ]
    more = len(steps) + len(depth) - len(charts)
    parts = [folded_legend(names), element("div", {"class": "charts"}, *charts)] if charts else []
    if more:
        parts.append(
            element("p", {"class": "soft"}, f"{more} more charts are left out; see below.")
        )
    for probe in report_probes.measured(lines):
        parts += _measured(probe, runs)
    return join(parts)


def _measured(probe: Probe, runs: Sequence[Run]) -> list[Markup]:
    """The probe's main result, a row for each stage and setting; all others folded."""
    heads = [join([run_swatch(number), run.name]) for number, run in enumerate(runs)]
    tables = []
    for result in probe.results:
        rows = [
            [
                row.stage or "\N{EN DASH}",
                element("td", {"class": "text"}, row.settings),
                *[_last(row, result, number, run) for number, run in enumerate(runs)],
            ]
            for row in probe.rows
            if result in row.values
        ]
        caption = f"{probe.name}: {result}" + (f" ({probe.shared})" if probe.shared else "")
        tables.append(table(["stage", "settings", *heads], rows, caption))
    main, *others = tables
    parts = [element("h3", {}, probe.name), main]
    if others:
        count = len(others)
        named = ", ".join(probe.results[1:6]) + (", ..." if count > 5 else "")
        parts.append(folded(f"{count} more of {probe.name}: {named}", *others))
    return parts


def _last(row: Row, result: str, number: int, run: Run) -> Markup:
    """A run's value; the step beside it where the weights are not the last ones."""
    if number not in row.values[result]:
        return _cell(None, "")
    value, step = row.values[result][number]
    return _cell(value, row.unit(result), "" if step == run.step else f"step {step:,}")


# Pictures.


def _evaluations(
    runs: Sequence[Run], drawn: Mapping[str, tuple[list[Picture], list[str]]]
) -> Markup:
    parts = []
    for run in runs:
        found, notes = drawn[run.name]
        if not found and not notes:
            continue
        if len(runs) > 1:
            parts.append(element("h3", {}, run.name))
        parts += [element("p", {"class": "warn"}, note) for note in notes]
        figures = [_picture(each, f"{run.name}: {each.title}") for each in found]
        parts.append(element("div", {"class": "pictures"}, *figures))
    return join(parts)


def _previews(runs: Sequence[Run], previews: Mapping[str, Picture | str]) -> Markup:
    parts: list[Child] = []
    if any(isinstance(made, Picture) for made in previews.values()):
        text = "One batch of each recipe through its own graph, as fastssl.preview draws it."
        parts.append(element("p", {"class": "soft"}, text))
    for run in runs:
        made = previews.get(run.name)
        if made is None:
            continue
        if len(runs) > 1:
            parts.append(element("h3", {}, run.name))
        if isinstance(made, str):
            parts.append(element("p", {"class": "warn"}, f"No preview of the input: {made}"))
        else:
            alt = f"{run.name}: {made.title}. {made.caption}"
            parts.append(element("div", {"class": "wide"}, _image(made, alt)))
    return join(parts)


def _picture(picture: Picture, alt: str) -> Markup:
    return element(
        "figure",
        {"class": "picture"},
        element(
            "figcaption",
            {},
            element("b", {}, picture.title),
            " ",
            element("small", {}, picture.caption),
        ),
        _image(picture, alt),
    )


def _image(picture: Picture, alt: str) -> Markup:
    width, height = str(picture.width), str(picture.height)
    return element("img", {"src": picture.uri, "alt": alt, "width": width, "height": height})


# Throughput.


def _spans(run: Run) -> list[tuple[dict[str, Any], int, float]]:
    """Each line of training with the step it begins after, and its seconds."""
    batch = run.option("train", "batch")
    spans, before = [], 0
    for line in run.lines:
        rate, steps = line.get("images_per_second"), line["step"] - before
        if _is_finite(batch) and _is_finite(rate) and rate > 0 and steps > 0:
            spans.append((line, before, steps * batch / rate))
        before = line["step"]
    return spans


def _is_finite(value: Any) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)


def _throughput(runs: Sequence[Run]) -> Markup:
    rows, words = [], []
    for number, run in enumerate(runs):
        spans = _spans(run)
        warm = [each for each in spans if each[1] >= WARM_UP] or spans
        if not warm:
            continue
        seconds = sum(each[2] for each in warm)
        rates = [line["images_per_second"] for line, _, _ in warm]
        images = sum(rate * time for rate, (_, _, time) in zip(rates, warm, strict=True))
        waits = [
            (float(line["data_wait"]), time)
            for line, _, time in warm
            if _is_finite(line.get("data_wait"))
        ]
        waited = sum(w * t for w, t in waits) / sum(t for _, t in waits) if waits else None
        worst = max((wait for wait, _ in waits), default=None)
        rows.append(
            [
                join([run_swatch(number), run.name]),
                _cell(images / seconds, "images/s"),
                _cell(statistics.median(rates), "images/s"),
                element("td", {}, f"{min(rates):,.3g} to {max(rates):,.3g}"),
                _cell(waited, "%"),
                _cell(worst, "%"),
                element("td", {}, f"{len(warm):,} of {len(run.lines):,}"),
            ]
        )
        if waited is not None:
            words.append(element("li", {}, *_what_binds(run, waited)))
    if not rows:
        return element("p", {}, "No line of training tells a rate yet.")
    head = (
        *("run", "mean images/s", "median", "range", "waiting for images", "worst line"),
        "lines",
    )
    caption = f"Lines that begin in the first {WARM_UP} steps are left out where there are others"
    return join([table(head, rows, caption, numbers=True), element("ul", {}, *words)])


def _what_binds(run: Run, waited: float) -> list[Child]:
    """In the words of the training's own advice."""
    start = run.starts[-1] if run.starts else {}
    command = shlex.join(["python", "-m", "benchmarks", "stages", str(run.folder / "recipe.yaml")])
    told = f"{waited:.0%} of the time goes by in waiting for images"
    tells: list[Child] = [" This tells what binds: ", element("code", {}, command)]
    if waited > WAITING:
        return [element("b", {}, run.name), f": {told}: reading and decoding bind.", *tells]
    if str(start.get("device", "cpu")) == "cpu" or "x86" in str(start.get("device")):
        text = f": {told}. On a CPU loader and step share the cores, so that says little."
        return [element("b", {}, run.name), text, *tells]
    return [element("b", {}, run.name), f": {told}: the step on the device binds, not the data."]


# Recipe.


def _recipe(runs: Sequence[Run]) -> Markup:
    told = [(number, run) for number, run in enumerate(runs) if run.recipe]
    if not told:
        return element("p", {}, "No recipe can be read.")
    keys = dict.fromkeys(
        f"{section}.{key}"
        for _, run in told
        for section in run.recipe
        for key in run.recipe[section]
    )
    # Of "optim.lr: 0.1 there, 0.2 here" the key: no key has a colon, they are identifiers.
    first = told[0][1].recipe
    unlike = {
        line.partition(": ")[0]
        for _, run in told[1:]
        for line in config.differences(first, run.recipe)
    }
    heads = [join([run_swatch(number), run.name]) for number, run in told]
    differing = [key for key in keys if key in unlike]
    rows = {key: [key, *[_setting(run, key, key in unlike) for _, run in told]] for key in keys}
    plain = [[key, *[_setting(run, key, False) for _, run in told]] for key in differing]
    parts: list[Markup] = []
    if len(told) > 1:
        caption = f"What differs: {len(differing)} of {len(keys)} keys"
        if differing:
            parts.append(table(["key", *heads], plain, caption))
        else:
            parts.append(element("p", {}, "All keys are equal."))
    caption = f"All {len(keys)} keys" + (", with what differs marked" if differing else "")
    parts.append(folded(caption, table(["key", *heads], list(rows.values()), caption)))
    return join(parts)


def _setting(run: Run, key: str, differs: bool) -> Markup:
    section, _, name = key.partition(".")
    keys = run.recipe.get(section, {})
    text = in_yaml(keys[name]) if name in keys else "\N{EN DASH}"
    attributes: dict[str, str | None] = {"class": "differs"} if differs else {}
    return element("td", attributes, element("code", {}, text))


# Environment.


def _environment(runs: Sequence[Run]) -> Markup:
    parts = []
    for number, run in enumerate(runs):
        if not run.starts:
            parts.append(element("p", {}, f"{run.name}: no start is recorded."))
            continue
        rows = []
        for place, start in enumerate(run.starts, 1):
            versions = start.get("versions")
            versions = versions if isinstance(versions, dict) else {}
            told = [f"{name} {version}" for name, version in versions.items() if version]
            command = start.get("command")
            words = [str(word) for word in command] if isinstance(command, list) else []
            device = str(start.get("device", "unknown"))
            rows.append(
                [
                    f"start {place}",
                    str(start.get("time", "unknown")),
                    element("td", {}, element("code", {}, shlex.join(words))),
                    f"{device}, {start.get('processes', '?')} process(es)",
                    f"{start.get('host', 'unknown')}, {start.get('platform', 'unknown')}",
                    f"Python {start.get('python', 'unknown')}, {', '.join(told)}",
                    str(start.get("commit") or "unknown"),
                    str(start.get("resumed") or "from the start"),
                ]
            )
        head = (
            *("", "time", "command", "device", "host", "versions", "commit"),
            "went on from",
        )
        last = run.starts[-1]
        summary = join(
            [
                run_swatch(number),
                f"{run.name}: {len(rows)} start{'s' if len(rows) > 1 else ''}, last on"
                f" {last.get('host', 'unknown')}, {last.get('device', 'unknown')}",
            ]
        )
        body: list[Child] = [table(head, rows, f"Starts of {run.name}, in {run.folder}")]
        body += [
            _diff(f"Changes since the commit, at start {place}", str(start["diff"]))
            for place, start in enumerate(run.starts, 1)
            if start.get("diff")
        ]
        parts.append(folded(summary, *body, opened=len(runs) == 1))
    return join(parts)


def _diff(title: str, text: str) -> Markup:
    lines = text.count("\n")
    cut = text[:MOST_DIFF]
    if len(cut) < len(text):
        cut += f"\n... {len(text) - len(cut):,} more characters are in environment.json"
    return folded(f"{title}: {lines:,} lines", element("pre", {"tabindex": "0"}, cut))
