"""What trained backbones are good for: every probe on many runs, one table, spread over seeds.

    python -m benchmarks probes RUN [RUN ...] [section.key=value ...] [--random N] [--out FILE]

RUNs are run folders; those whose names differ in a last -0, -1, ... are seeds of one thing. For
each: weighted kNN, logistic regression by L-BFGS at every depth, an MLP on the last one, and
logistic regression on few labels, all by fastssl/evaluate.py, whose keys may follow (data.root=...,
without: the built-in images; linear.* is for L-BFGS, mlp.* for the MLP). --random adds the first
RUN's network with fresh weights.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import method, result
from benchmarks.__main__ import run_command
from benchmarks.result import Row
from fastssl import journal

HELP = "what trained backbones are good for: every probe on many runs, spread over seeds"
CHECKOUT = Path(__file__).resolve().parents[1]
COMMON = ("data", "evaluation", "loader", "features", "evaluate")  # sections that all commands take
# What is asked of evaluate.py for one column, or one for each depth.
PROBES = {
    "linear": ("linear",),  # first: it asks for every depth, the others find theirs among them
    "knn": ("knn", "knn.neighbours=[20]", "knn.temperature=[0.07]"),
    "mlp": ("linear", "linear.protocol=mlp", "features.stages=[last]"),
    "few labels": ("fewlabels", "fewlabels.method=[linear]", "features.stages=[last]"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUNs, keys, and how many random networks."""
    parser.add_argument(
        "arguments", nargs="+", metavar="ARGUMENT", help="run folders, and section.key=value"
    )
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="seeds of the first RUN's network"
    )
    method.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Evaluates, prints the table; the exit code is 1 when an evaluation failed."""
    overrides = [each for each in arguments.arguments if "=" in each]
    runs = [Path(each) for each in arguments.arguments if "=" not in each]
    for run in runs:
        if not (run / "backbone.json").is_file():
            raise ValueError(f"{run} is no finished run folder: it has no backbone.json")
    if arguments.random and not runs:
        raise ValueError("--random takes its network from the first RUN: name one")
    asked = {name: [*command, *keys_of(name, overrides)] for name, command in PROBES.items()}
    values: dict[str, dict[str, list[float]]] = {}  # of which network -> column -> one a seed
    with tempfile.TemporaryDirectory() as folder:
        for name, command in asked.items():
            for seed in range(arguments.random):
                out = Path(folder) / f"{name}-{seed}"
                evaluate([*command, f"random:{runs[0]}", f"seed={seed}", f"out={out}"])
                _add(values, "random", name, journal.read(out))
            before = {run: len(journal.read(run)) for run in runs}
            evaluate([*command, *map(str, runs)])
            for run in runs:
                lines = journal.read(run)[before[run] :]
                _add(values, network_of(run), name, lines)
    print(table(values))
    if arguments.out is not None:
        rows = [
            Row(name=column, group=network, unit="share", values=each)
            for network, columns in values.items()
            for column, each in columns.items()
        ]
        settings = {"commands": asked, "overrides": overrides, "note": arguments.note}
        settings["runs"] = [run.name for run in runs]
        result.write(arguments.out, result.make("probes", rows, settings))
    return 0


def evaluate(command: Sequence[str]) -> None:
    """One call of fastssl/evaluate.py, whose words are shown.

    Raises:
        ValueError: it failed; what it said stands above.
    """
    print(f"evaluate {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "fastssl.evaluate", *command], cwd=CHECKOUT)
    if done.returncode:
        raise ValueError(f"fastssl.evaluate {command[0]} ended with {done.returncode}: see above")


def keys_of(name: str, overrides: Sequence[str]) -> list[str]:
    """Of `overrides`, those that a probe takes, as evaluate.py calls them."""
    own = {"knn": "knn", "linear": "linear", "mlp": "mlp", "few labels": "fewlabels"}[name]
    keys = []
    for override in overrides:
        section = override.partition(".")[0]
        if section not in (*COMMON, "knn", "linear", "mlp", "fewlabels"):
            raise ValueError(f"{override}: no probe has a section {section!r}")
        if section in (*COMMON, own):
            keys.append(f"linear{override[3:]}" if section == "mlp" else override)
    return keys


def network_of(run: Path) -> str:
    """The name of a run folder without its seed."""
    return re.sub(r"-\d+$", "", run.resolve().name)


def table(values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A row a network: mean and, of two seeds or more, standard deviation, in per cent."""
    columns = list(dict.fromkeys(column for each in values.values() for column in each))
    lines = [f"| network | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for network, found in values.items():
        cells = [_cell(found[column]) if column in found else "-" for column in columns]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} +- {100 * statistics.stdev(values):.1f}"


def _add(
    values: dict[str, dict[str, list[float]]],
    network: str,
    name: str,
    lines: Sequence[Mapping[str, Any]],
) -> None:
    """The accuracies that a probe has just logged, one column each."""
    found = [line for line in lines if "probe" in line]
    assert found, f"{name} logged nothing for {network}"
    for line in found:
        column = name
        if name == "linear":
            column = f"linear {line['stage']}"
        elif name == "few labels":
            column = f"{line['labels']} of labels"
        values.setdefault(network, {}).setdefault(column, []).append(line["accuracy"])


if __name__ == "__main__":
    run_command("probes")
