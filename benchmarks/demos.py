"""Every recipe's demo by its own command: how long, how well the task is solved, kNN around it.

    python -m benchmarks demos [RECIPE.yaml ...] [section.key=value ...] [--runs DIR] [--out FILE]

Without a recipe: all of recipes/*.yaml, one after another, each in a process of its own on the
built-in images. What is printed is the table of the README; the numbers are of one run with one
seed (on a CPU the same run gives the same numbers).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import method, result
from benchmarks.__main__ import run_command
from benchmarks.result import Row
from fastssl import journal

HELP = "every recipe's demo: seconds, pretext accuracy against chance, kNN before and after"
CHECKOUT = Path(__file__).resolve().parents[1]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Recipes, and what is set in all of them."""
    parser.add_argument(
        "arguments", nargs="*", metavar="ARGUMENT", help="recipes, and section.key=value for all"
    )
    parser.add_argument("--runs", type=Path, metavar="DIR", help="where run folders go, and stay")
    method.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Runs the demos; the exit code is 1 when one of them failed."""
    recipes = [Path(each) for each in arguments.arguments if "=" not in each]
    overrides = [each for each in arguments.arguments if "=" in each]
    for recipe in recipes:
        if not recipe.is_file():
            raise ValueError(f"there is no recipe {recipe}; without one, all of recipes/ are run")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        for recipe in recipes or sorted((CHECKOUT / "recipes").glob("*.yaml")):
            demo = run(recipe, runs / recipe.stem, overrides)
            print(line(demo), flush=True)
            rows += rows_of(demo)
    if arguments.out is not None:
        settings = {"overrides": overrides, "note": arguments.note}
        result.write(arguments.out, result.make("demos", rows, settings))
    return int(any(row.extra.get("exit_code") for row in rows))


def run(recipe: Path, out: Path, overrides: list[str]) -> dict:
    """One demo into the run folder `out`; its numbers."""
    settings = ["--quiet", "--num_processes", "1", "--num_machines", "1"]
    settings += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *settings]
    train = ["fastssl/train.py", str(recipe.resolve()), f"train.out={out.resolve()}", *overrides]
    began = time.perf_counter()
    done = subprocess.run(
        [*launch, *train], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seconds = time.perf_counter() - began
    demo = {"recipe": recipe.stem, "exit_code": done.returncode, "seconds": seconds}
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return demo
    lines = journal.read(out)
    logged = [line for line in lines if "loss" in line]
    last = logged[-max(1, len(logged) // 10) :]  # a tenth of the run: single lines are noisy
    probes = [line["accuracy"] for line in lines if line.get("probe") == "knn"]
    return demo | {
        "steps": logged[-1]["step"],
        "accuracy_first": logged[0]["accuracy"],
        "accuracy": sum(line["accuracy"] for line in last) / len(last),
        "chance": sum(line["chance"] for line in last) / len(last),
        "knn_before": probes[0] if probes else None,
        "knn_after": probes[-1] if probes else None,
    }


def rows_of(demo: dict) -> list[Row]:
    """Its seconds and, if it did not fail, its accuracies as shares of 1."""
    group = demo["recipe"]
    failed = demo["exit_code"] != 0
    steps = {} if failed else {"steps": demo["steps"]}
    extra = {"exit_code": demo["exit_code"], **steps}
    rows = [Row(name="run", group=group, unit="s", values=[demo["seconds"]], extra=extra)]
    if failed:
        return rows
    around = {"chance": demo["chance"], "first": demo["accuracy_first"]}
    accuracy = [demo["accuracy"]]
    rows.append(Row(name="accuracy", group=group, unit="share", values=accuracy, extra=around))
    for name, key in (("kNN before", "knn_before"), ("kNN after", "knn_after")):
        if demo[key] is not None:
            rows.append(Row(name=name, group=group, unit="share", values=[demo[key]]))
    return rows


def line(demo: dict) -> str:
    """Its line of the table: seconds, pretext accuracy, chance, kNN before and after."""
    if demo["exit_code"]:
        return f"| {demo['recipe']} | failed ({demo['exit_code']}) |"
    numbers = [
        f"{100 * demo[name]:.1f} %" if demo[name] is not None else "-"
        for name in ("accuracy", "chance", "knn_before", "knn_after")
    ]
    return f"| {demo['recipe']} | {demo['seconds']:.0f} s | {' | '.join(numbers)} |"


if __name__ == "__main__":
    run_command("demos")
