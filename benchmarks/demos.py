"""Every recipe's demo by its own command: how long, how well the task is solved, kNN around it.

    python -m benchmarks.demos [RECIPE.yaml ...] [section.key=value ...] [--runs DIR] [--out FILE]

Without a recipe: all of recipes/*.yaml, one after another, each in a process of its own on the
built-in images. What is printed is the table of the README; the numbers are of one run with one
seed (on a CPU the same run gives the same numbers).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.pirl_loader import manifest
from fastssl import journal

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs the demos; the exit code is 1 when one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("arguments", nargs="*", help="recipes, and section.key=value for all")
    parser.add_argument("--runs", type=Path, help="where run folders go, and stay")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    recipes = [Path(each) for each in given.arguments if "=" not in each]
    overrides = [each for each in given.arguments if "=" in each]
    with tempfile.TemporaryDirectory() as temporary:
        runs = given.runs or Path(temporary)
        demos = []
        for recipe in recipes or sorted((CHECKOUT / "recipes").glob("*.yaml")):
            demos.append(run(recipe, runs / recipe.stem, overrides))
            print(row(demos[-1]), flush=True)
    if given.out is not None:
        result = {"benchmark": "demos", "demos": demos, "manifest": manifest()}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(demo["exit_code"] for demo in demos))


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
    probes = [line["accuracy"] for line in lines if "probe" in line]
    return demo | {
        "steps": logged[-1]["step"],
        "accuracy_first": logged[0]["accuracy"],
        "accuracy": sum(line["accuracy"] for line in last) / len(last),
        "chance": sum(line["chance"] for line in last) / len(last),
        "knn_before": probes[0] if probes else None,
        "knn_after": probes[-1] if probes else None,
    }


def row(demo: dict) -> str:
    """Its line of the table: seconds, pretext accuracy, chance, kNN before and after."""
    if demo["exit_code"]:
        return f"| {demo['recipe']} | failed ({demo['exit_code']}) |"
    numbers = [
        f"{100 * demo[name]:.1f} %" if demo[name] is not None else "-"
        for name in ("accuracy", "chance", "knn_before", "knn_after")
    ]
    return f"| {demo['recipe']} | {demo['seconds']:.0f} s | {' | '.join(numbers)} |"


if __name__ == "__main__":
    sys.exit(main())
