"""Object stores: what lies under s3:// read in one piece, kept on disk, or fetched ahead of need.

A user's environment says who asks: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_REGION, AWS_ENDPOINT_URL, AWS_PROFILE, and AWS_SKIP_SIGNATURE=true for public buckets; on AWS's
own machines it is their role.
"""

import fcntl
import hashlib
import os
import re
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.readers import object_requests
from pipelines.readers.object_requests import (
    SCHEME,
    Access,
    Missing,
    Stop,
    Tries,
    Unreachable,
    fetch,
    fetch_apart,
)

PIECE = 8 << 20  # bytes of one request, where a large file is fetched whole
WRONG = 3  # tries at most, where what came is not what the index says: it may have been replaced
UNKNOWN = 4 << 20  # bytes: an object of unknown size, until some came; then their mean
STEPS, ROWS = 512, 16384  # asked for ahead at most, where images are few or small
DEFAULT = Access()


def is_url(text: str) -> bool:
    """Whether `text` names something in an object store, and no file."""
    return text.startswith(SCHEME)


def refuse_others(key: str, text: str) -> None:
    """Refuses a url that is none of an object store's: as a path it would name no file.

    Raises:
        ValueError: names `key`, an option, which has it.
    """
    if re.match("[A-Za-z][A-Za-z0-9+.-]*://", text) and not is_url(text):
        raise ValueError(
            f"{key} ({text}): of urls only {SCHEME}bucket/prefix is read, in small letters; a file"
            " or folder of this machine is given by its path alone"
        )


def join(url: str, name: str) -> str:
    """What lies under `url` by the name `name`."""
    return f"{url.rstrip('/')}/{name}"


def read(url: str, access: Access = DEFAULT) -> bytes:
    """A whole object.

    Raises:
        Unreachable: after all tries; Missing: there is no such object.
        ValueError: the url names no object, or the library is missing.
    """
    return fetch(url, 0, None, Tries(url, access, Stop())).tobytes()


def size(url: str, access: Access = DEFAULT) -> int:
    """Bytes of an object; raises as `read`."""
    return object_requests.size(url, Tries(url, access, Stop()))


def sizes(urls: list[str], access: Access = DEFAULT) -> list[int | None]:
    """Bytes of each object, `access.requests` asked for at a time; None: there is no such object.

    Raises:
        Unreachable: one can't be asked for, after all tries.
        ValueError: a url names no object, or the library is missing.
    """
    stop = Stop()

    def one(url: str) -> int | None:
        try:
            return object_requests.size(url, Tries(url, access, stop))
        except Missing:
            return None

    with ThreadPoolExecutor(access.requests, "object-store") as executor:
        try:
            return list(executor.map(one, urls))
        finally:
            stop.set()  # after an error nobody tries again


def cached(url: str, folder: Path, size: int | None, sha256: str, access: Access = DEFAULT) -> Path:
    """A large object as a file, fetched once a machine: other processes wait for the first.

    Args:
        url: of the object.
        folder: for the file, which has the name that it has in the url; made if missing.
        size: bytes, if known.
        sha256: of the object; what lies in `folder` is compared again and, if damaged, replaced.
        access: how it is asked for.

    Raises:
        Unreachable: after all tries, or it is another object than the checksum's.
        ValueError: `folder` can't be written, or the checksum is none.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{url}: its checksum ({sha256!r}) is no SHA-256: the manifest is damaged")
    kept = folder / url.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(kept.with_name(f"{kept.name}.lock")):
            if not _is(kept, sha256):
                _download(url, kept, size, sha256, access)
    except Unreachable:  # the store, and not the disk
        raise
    except OSError as error:
        raise ValueError(f"cannot keep {url} in {folder}: {error.strerror}") from None
    return kept


@dataclass(frozen=True)
class Part:
    """Rows that lie near each other in one object: they come by one request."""

    url: str
    rows: tuple[int, ...]
    # bytes, ascending and apart; None: the one row is the whole object, of unknown size
    starts: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None


class Ahead:
    """The bytes of rows, fetched before they are asked for and given in the order of a plan.

    For one thread. At most `limit` bytes are held or under way, and one part more, or what the step
    needs that is asked for; a row's are let go when the last planned step that needs them was
    given.
    Threads end when it is closed or forgotten, and begin anew when a step is asked for.
    """

    def __init__(
        self,
        wanted: Callable[[int], np.ndarray],
        parts: Callable[[list[int]], list[Part]],
        *,
        group: Callable[[np.ndarray], np.ndarray] | None = None,
        check: Callable[[int, np.ndarray], str | None] | None = None,
        accept: Callable[[int, np.ndarray | None], np.ndarray] | None = None,
        limit: int = 256 << 20,
        look: int = 0,
        access: Access = DEFAULT,
    ) -> None:
        """Nothing is asked for before the first step.

        Args:
            wanted: the rows of a step, int64 [n], a pure function; raises StopIteration at the end.
            parts: by which requests rows of one group come; they are given ascending, one at a time
                if there are no groups.
            group: which rows come together: a number each, int64 [n]. None: each alone.
            check: what is wrong with the content of a row, uint8 [bytes], if anything is: it is
                then asked for again. Called by several threads.
            accept: what to give for the content of a row, or for None where there is no such
                object. None: what came, and a missing object raises. Called by several threads.
            limit: bytes held or under way.
            look: rows that are planned ahead of those that are asked for: as many as may lie
                between the first and the last of a group, else groups are fetched twice.
            access: how they are asked for.
        """
        self._wanted, self._parts, self._group = wanted, parts, group
        self._check, self._accept = check, accept
        self._limit, self._look, self._access = limit, look, access
        self._mean = float(UNKNOWN)  # bytes of an object
        self._seen = 0  # objects that went into it
        self._end: Callable[[], object] | None = None
        self._forget()

    def step(self, number: int) -> list[np.ndarray]:
        """The contents of a step's rows, in their order: uint8 [bytes], not to be written.

        Raises:
            Unreachable: one of them can't be had.
            StopIteration: of the plan, and whatever else it raises.
        """
        if self._executor is None or number != self._next:
            self._begin(number)
        if not self._steps and not self._plan():
            self._wanted(number)  # its error, in its place
            raise AssertionError(f"the plan gives step {number} only when asked twice")
        if not self._asked:
            self._queue_next()
        rows = self._steps[0].tolist()
        for row in rows:
            while row not in self._held:
                self._ask(self._queue.popleft())
        self._fill()
        try:
            found = []
            for row in rows:
                found.append(self._part_of(row)[row])
                self._fill()
        except BaseException:
            self._stop_all(wait=False)  # of a store that can't be reached, nobody waits for more
            raise
        self._let_go(rows)
        self._fill()
        return found

    @property
    def held(self) -> int:
        """Bytes held or under way, as far as sizes are known."""
        return self._bytes

    def close(self) -> None:
        """Ends the threads, waits for them and lets all bytes go."""
        self._stop_all(wait=True)

    def _stop_all(self, *, wait: bool) -> None:
        executor = self._executor
        if self._end is not None:
            self._end()
        if executor is not None and wait:
            executor.shutdown()
        self._forget()

    def _forget(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._stop = Stop()
        self._next = 0
        self._steps: deque[np.ndarray] = deque()  # planned and not given
        self._asked = 0  # of them, those whose rows are in the queue, under way or here
        self._asked_rows = 0  # in these
        self._unasked = 0  # rows in the others
        self._is_all = False  # the plan ends behind them
        self._uses: Counter[int] = Counter()  # planned, by row
        self._waiting: dict[int, set[int]] = {}  # planned rows that are not yet there, by group
        self._queue: deque[Part] = deque()  # next to be asked for
        self._known: set[int] = set()  # rows in the queue, under way or here
        # by row: the part that it comes with, and what comes
        self._held: dict[int, tuple[Part, Future[dict[int, np.ndarray]]]] = {}
        self._cost: dict[int, int] = {}  # bytes of the held rows, as known or supposed
        self._bytes = 0  # sum of them
        self._sizes: deque[tuple[int, int]] = deque()  # rows and bytes that came unknown

    def _begin(self, number: int) -> None:
        self._stop_all(wait=True)
        self._next = number
        self._executor = ThreadPoolExecutor(self._access.requests, "object-store")
        # By a function that does not hold us: who forgets us ends the threads too.
        self._end = weakref.finalize(self, _end, self._executor, self._stop)

    def _plan(self) -> bool:
        """Plans one more step; False: there is none."""
        if self._is_all:
            return False
        try:
            rows = np.array(self._wanted(self._next + len(self._steps)), np.int64)
        except Exception:
            self._is_all = True  # whatever it is: told when its step is asked for
            return False
        self._steps.append(rows)
        self._unasked += len(rows)
        self._uses.update(rows.tolist())
        groups = rows if self._group is None else self._group(rows)
        for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
            if row not in self._known:
                self._waiting.setdefault(group, set()).add(row)
        return True

    def _queue_next(self) -> bool:
        """Queues what the first step needs that was not queued; False: there is none."""
        while self._unasked < self._look and self._plan():
            pass
        if self._asked == len(self._steps) and not self._plan():
            return False
        rows = self._steps[self._asked]
        self._asked += 1
        self._asked_rows += len(rows)
        self._unasked -= len(rows)
        groups = rows if self._group is None else self._group(rows)
        for group in dict.fromkeys(groups.tolist()):
            together = self._waiting.pop(group, None)
            if together:
                self._known |= together
                self._queue += self._parts(sorted(together))
        return True

    def _ask(self, part: Part) -> None:
        assert self._executor is not None
        self._hold(
            part,
            self._executor.submit(
                _content, part, self._check, self._accept, self._access, self._stop
            ),
        )
        costs = part.sizes or (int(self._mean),)
        for row, cost in zip(part.rows, costs, strict=True):
            self._cost[row] = cost
            self._bytes += cost

    def _hold(self, part: Part, future: "Future[dict[int, np.ndarray]]") -> None:
        if part.sizes is None:
            (row,), sizes = part.rows, self._sizes
            future.add_done_callback(lambda done: _note(done, row, sizes))
        self._held |= dict.fromkeys(part.rows, (part, future))

    def _part_of(self, row: int) -> dict[int, np.ndarray]:
        """What comes with a held row, once it is here.

        Of a failure that is older than the question there is another try: the store may long be
        well again. At once and here, for in the queue it would stand behind all that is ahead.
        """
        part, future = self._held[row]
        is_old = future.done()
        try:
            return future.result()
        except Unreachable as error:
            if not is_old or isinstance(error, Missing):
                raise
        again: Future[dict[int, np.ndarray]] = Future()
        again.set_result(_content(part, self._check, self._accept, self._access, self._stop))
        self._hold(part, again)
        return again.result()

    def _fill(self) -> None:
        """Asks for the next steps, until as many bytes as allowed are held or under way."""
        while self._sizes:
            row, found = self._sizes.popleft()
            self._seen = min(self._seen + 1, 1000)
            self._mean += (found - self._mean) / self._seen
            if row in self._cost:
                self._bytes += found - self._cost[row]
                self._cost[row] = found
        while self._bytes < self._limit:
            if self._queue:
                self._ask(self._queue.popleft())
            elif self._asked == STEPS or self._asked_rows > ROWS or not self._queue_next():
                return

    def _let_go(self, rows: list[int]) -> None:
        """The first step was given."""
        self._steps.popleft()
        self._asked -= 1
        self._asked_rows -= len(rows)
        self._next += 1
        for row in rows:
            self._uses[row] -= 1
            if not self._uses[row]:
                del self._uses[row]
                self._known.remove(row)
                self._bytes -= self._cost.pop(row)
                del self._held.pop(row)[1].result()[row]


def _note(done: "Future[dict[int, np.ndarray]]", row: int, sizes: deque[tuple[int, int]]) -> None:
    if not done.cancelled() and done.exception() is None:
        sizes.append((row, len(done.result()[row])))


def _end(executor: ThreadPoolExecutor, stop: Stop) -> None:
    stop.set()
    executor.shutdown(wait=False, cancel_futures=True)


def _content(
    part: Part,
    check: Callable[[int, np.ndarray], str | None] | None,
    accept: Callable[[int, np.ndarray | None], np.ndarray] | None,
    access: Access,
    stop: Stop,
) -> dict[int, np.ndarray]:
    """What to give for a part's rows."""
    try:
        found = _checked(part, check, access, stop)
    except Missing:
        if accept is None:
            raise
        return {row: accept(row, None) for row in part.rows}
    if accept is None:
        return found
    return {row: accept(row, content) for row, content in found.items()}


def _checked(
    part: Part, check: Callable[[int, np.ndarray], str | None] | None, access: Access, stop: Stop
) -> dict[int, np.ndarray]:
    """The bytes of a part's rows."""
    tries = Tries(part.url, access, stop)
    if part.starts is None or part.sizes is None:
        (row,) = part.rows
        found = {row: fetch(part.url, 0, None, tries)}
    elif len(part.rows) == 1:
        found = {part.rows[0]: fetch(part.url, part.starts[0], part.sizes[0], tries)}
    else:
        each = fetch_apart(part.url, part.starts, part.sizes, tries)
        found = dict(zip(part.rows, each, strict=True))
    if check is None:
        return found
    for place, row in enumerate(part.rows):
        wrong = check(row, found[row])
        for number in range(1, WRONG + 1):
            if wrong is None:
                break
            if number == WRONG:
                raise Unreachable(f"{wrong}, {number} times")
            at = 0 if part.starts is None else part.starts[place]
            size = None if part.sizes is None else part.sizes[place]
            found[row] = fetch(part.url, at, size, Tries(part.url, access, stop))
            wrong = check(row, found[row])
    return found


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Of the processes of a machine."""
    with open(lock, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is(path: Path, sha256: str) -> bool:
    try:
        with open(path, "rb") as file:
            state = hashlib.sha256()
            while block := file.read(1 << 22):
                state.update(block)
    except FileNotFoundError:
        return False
    return state.hexdigest() == sha256


def _download(url: str, to: Path, bytes_: int | None, sha256: str, access: Access) -> None:
    """Writes an object to a file by several requests; it has its name when it is whole."""
    found = size(url, access)
    if bytes_ is not None and found != bytes_:
        raise Unreachable(f"{url}: it has {found:,} bytes, not {bytes_:,}: was it replaced?")
    part = to.with_name(f"{to.name}.{os.getpid()}.part")
    stop = Stop()
    executor = ThreadPoolExecutor(access.requests, "object-store")

    def piece(start: int) -> None:
        length = min(PIECE, found - start)
        content = fetch(url, start, length, Tries(url, access, stop))
        with open(part, "r+b") as file:
            file.seek(start)
            file.write(content.data)

    try:
        with open(part, "wb") as file:
            file.truncate(found)
        for _ in executor.map(piece, range(0, found, PIECE)):
            pass
        if not _is(part, sha256):
            raise Unreachable(
                f"{url}: its SHA-256 is not {sha256[:12]}..., as the manifest says: copy the store"
                " to the bucket again"
            )
        part.replace(to)
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)
        part.unlink(missing_ok=True)
