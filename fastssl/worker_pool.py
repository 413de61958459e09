"""Work shared out to processes, its results in order; Ctrl-C and killed workers do no harm."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class WorkerLost(ValueError):
    """A worker was killed: by the kernel for want of memory, or by what it was given."""

    def __init__(self, workers: int, pieces: list[Any]) -> None:
        """Says it in a line.

        Args:
            workers: processes that there were.
            pieces: that they were busy with; one of them it was.
        """
        fewer = f": give fewer than --workers {workers}" if workers > 1 else ""
        super().__init__(f"a worker process was killed, perhaps for want of memory{fewer}")
        self.pieces = pieces


def in_order(
    work: Callable[[Piece], Result], pieces: Iterable[Piece], workers: int
) -> Generator[Result, None, None]:
    """What `work` makes of each piece, in the order of the pieces.

    No more pieces are under way than keep the workers busy, so that memory does not grow. Close the
    generator (contextlib.closing): it ends the workers.

    Args:
        work: a function that a worker can import.
        pieces: what it is given, one at a time; drawn as they are needed.
        workers: processes.

    Raises:
        WorkerLost: a worker was killed.
    """
    # forkserver: the parent has threads of its own, which do not survive a fork. The workers import
    # the program again (`python -m fastssl.data`), so that nothing heavy is at its top.
    context = multiprocessing.get_context("forkserver")
    interrupt = Interrupt()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    pending: deque[tuple[Piece, Future[Result]]] = deque()
    try:
        for piece in pieces:
            pending.append((piece, executor.submit(work, piece)))
            if len(pending) > 2 * workers:
                yield interrupt.result(pending[0][1])
                pending.popleft()
        while pending:
            yield interrupt.result(pending[0][1])
            pending.popleft()
    except BrokenProcessPool:
        raise WorkerLost(workers, _busy_with(pending, workers)) from None
    finally:
        executor.shutdown(cancel_futures=True)
        interrupt.restore()


def _busy_with(pending: Iterable[tuple[Piece, Future[Result]]], workers: int) -> list[Piece]:
    """What the workers of a broken pool had begun: they begin in order, each one at a time."""
    lost = (
        piece
        for piece, future in pending
        if not future.done() or isinstance(future.exception(), BrokenProcessPool)
    )
    return list(islice(lost, workers))


class Interrupt:
    """Ctrl-C, told where it does no harm.

    Python raises KeyboardInterrupt between any two of its instructions: also between the taking of
    a lock of the executor's and the block that gives it back, and then shutdown waits for ever.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before = signal.getsignal(signal.SIGINT)
        # Another handler, or none in a script's background job, is the caller's wish.
        self._ours = (
            self._before is signal.default_int_handler
            and threading.current_thread() is threading.main_thread()
        )
        if self._ours:
            signal.signal(signal.SIGINT, lambda *_: self._asked.set())

    def result(self, future: Future[Result]) -> Result:
        """What the future gives.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        while not self._asked.is_set():
            if wait([future], timeout=0.1).done:
                return future.result()
        raise KeyboardInterrupt

    def restore(self) -> None:
        """The handler that was there before."""
        if self._ours:
            signal.signal(signal.SIGINT, self._before)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, on metadata that nobody needs
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers, which would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
