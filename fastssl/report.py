"""One self-contained HTML page of run folders: curves, probes, input, throughput, recipe, machine.

    python -m fastssl.report RUN [RUN ...] [--out report.html] [--no-preview]

RUN is a run folder: of a finished run, or of one that is at work or was stopped. Several runs are
shown side by side. The page loads nothing: it opens anywhere, prints, and needs no script but to
show values under the pointer.
"""

import argparse
import inspect
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fastssl
from fastssl.reporting import page as report_page
from fastssl.reporting import pictures as report_pictures
from fastssl.reporting.pictures import Picture
from fastssl.reporting.run import Run, read_all


def main(arguments: Sequence[str]) -> int:
    """Writes the page; returns the exit code."""
    given = _parser().parse_args(arguments)
    out = Path(given.out)
    try:
        _check_out(out)
        runs = read_all(given.runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    previews = {} if given.no_preview else {run.name: _preview(run) for run in runs}
    drawn = {run.name: report_pictures.drawn(run) for run in runs}
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    html = report_page.page(
        runs, previews, drawn, made=f"fastssl {fastssl.__version__}, made {now}"
    )
    data = html.encode("utf-8", errors="replace")  # a lone surrogate in a name is no UTF-8
    try:
        out.write_bytes(data)
    except OSError as error:
        print(f"error: --out ({out}) can't be written: {error}", file=sys.stderr)
        return 1
    for run in runs:
        print(f"{run.name}: {run.progress}")
        for note in run.notes:
            print(f"warning: {run.name}: {note}", file=sys.stderr)
    print(f"{out}: {len(data) / 1e6:.2f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.report",
        description=inspect.cleandoc(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, such as runs/rotation"
    )
    parser.add_argument(
        "--out", default="report.html", metavar="FILE.html", help="default: report.html"
    )
    parser.add_argument(
        "--no-preview", action="store_true", help="without the batch of each recipe's input"
    )
    return parser


def _check_out(out: Path) -> None:
    """Refuses what can't be written, before any work."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out ({out}) must end in .html")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--out ({out}): there is no folder {folder}: make it, or name another")
    if out.is_dir() or not os.access(out if out.exists() else folder, os.W_OK):
        raise ValueError(f"--out ({out}) can't be written: name another file")


def _preview(run: Run) -> Picture | str:
    """The picture, or why there is none: a run can be looked at long after its images are gone."""
    try:
        return report_pictures.batch(run, say=lambda text: print(text, file=sys.stderr))
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # DALI raises RuntimeError
        return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
