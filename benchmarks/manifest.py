"""What a result was measured on: machine, versions, commit, command, file system, page cache."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from fastssl import machine

CHECKOUT = Path(__file__).resolve().parents[1]

PageCache = Literal["warm", "cold"]


class Manifest(BaseModel):
    """What is needed to repeat a measurement, and to doubt it; null is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: dict[str, JsonValue]  # fastssl.machine.facts()
    commit: str | None  # of git; null outside a checkout
    dirty: bool | None  # whether files differed from that commit
    command: str
    measured: str | None  # when it ended, UTC
    load: list[float] | None  # of the whole machine, over 1, 5 and 15 minutes
    file_system: dict[str, JsonValue] | None  # of the data
    page_cache: PageCache | None  # whether the data was in it: a reading pass, or dropped


def make(
    data: Path | None = None,
    page_cache: PageCache | None = None,
    versions: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of a measurement that ends now.

    Args:
        data: a path of the images.
        page_cache: "warm" if they had been read before, "cold" if they were put out of the cache.
        versions: of packages of another interpreter (FFCV's); they stand beside this one's.
    """
    facts = machine.facts()
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return Manifest(
        machine={**facts, "versions": {**facts["versions"], **(versions or {})}},
        commit=commit or None,
        dirty=None if commit is None or changes is None else bool(changes),
        command=command(sys.orig_argv),
        measured=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        load=list(os.getloadavg()),
        file_system=None if data is None else machine.file_system(data),
        page_cache=page_cache,
    )


def command(arguments: list[str]) -> str:
    """The command line as it would be typed, whatever folder the interpreter is in."""
    return shlex.join(["python", *arguments[1:]])


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None where there is none, or no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
