"""Where the worker processes of the plain loaders come from."""

import multiprocessing
from multiprocessing.context import BaseContext


def clean() -> BaseContext:
    """A server process that imported what workers need, torch among it, once for all.

    Not forks of this process, in which DALI's threads run: Linux's default before Python 3.14.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.plain.pil", "benchmarks.plain.tuned"])
    return context
