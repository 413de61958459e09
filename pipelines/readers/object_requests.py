"""Requests to object stores, made again where they fail; nothing else here knows their library.

obstore (Rust) makes them: its threads hold no lock of Python's, and a request costs a thirteenth of
boto3's CPU time. A request that fails is made again, with growing pauses, from the byte on where it
broke off; when that does not help there is one line that says what happened (`Unreachable`).
"""

import importlib
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any

import numpy as np

SCHEME = "s3://"
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 20.0  # seconds between tries: doubled each time
BLOCK = 1 << 17  # bytes, at least, that are taken from an answer at a time
PROGRESS = 1 << 20  # bytes that earn a broken-off request another try


class Unreachable(ValueError):
    """An object can't be had, after all tries; the message is all that the user needs."""


class Missing(Unreachable):
    """There is no such object."""


class Away(Unreachable, ConnectionError):
    """No mistake of the user's, as far as can be told: the store may be well again later."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How patiently, and how often at a time, a process asks.

    Raises:
        ValueError: says which value can't be, and what to give.
    """

    retries: int = 10  # after the first try; pauses of 0.1 s, 0.2 s, ... 20 s: 65 s in all
    timeout_s: float = 30.0  # without a byte, until a connection is given up
    requests: int = 32  # at a time

    def __post_init__(self):
        if self.retries < 0:
            raise ValueError(f"retries ({self.retries}) must be at least 0")
        if not 0 < self.timeout_s <= 3600:
            raise ValueError(f"timeout_s ({self.timeout_s}) must be above 0 and at most 3600")
        if not 1 <= self.requests <= 1024:
            raise ValueError(f"requests ({self.requests}) must be in 1 ... 1024")


def size(url: str, tries: "Tries") -> int:
    """Bytes of an object; raises as `fetch`."""
    return int(_head(url, tries)["size"])


def fetch(url: str, start: int, size: int | None, tries: "Tries") -> np.ndarray:
    """So many bytes from `start` on, or all: uint8 [bytes].

    Raises:
        Unreachable: after all tries.
        ValueError: the url names no object, or the library is missing.
    """
    library = _library()
    store, key = _place(url, tries.access)
    try:  # most succeed at once, and need no second copy
        if size is not None:
            return _whole(library.get_range(store, key, start=start, length=size), size)
        answer = library.get(store, key)
        return _whole(answer.bytes(), int(answer.meta["size"]))
    except Exception as error:
        tries.failed(error)
    tag = None
    if size is None:
        found = _head(url, tries)
        size, tag = int(found["size"]), found["e_tag"]
    buffer = np.empty(size, np.uint8)

    def put(at: int, block: np.ndarray) -> None:
        buffer[at : at + len(block)] = block

    _stream(url, start, size, tag, put, tries)
    return buffer


def fetch_apart(
    url: str, starts: tuple[int, ...], sizes: tuple[int, ...], tries: "Tries"
) -> list[np.ndarray]:
    """What lies at some places, ascending and apart, by one request: uint8 [bytes] each.

    Each has memory of its own, so that it can be let go alone; what lies between is thrown away.
    Raises as `fetch`.
    """
    found = [np.empty(size, np.uint8) for size in sizes]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    place = 0

    def put(at: int, block: np.ndarray) -> None:
        nonlocal place
        at += starts[0]
        until = at + len(block)
        while place < len(starts) and starts[place] < until:
            first, last = max(at, starts[place]), min(until, ends[place])
            found[place][first - starts[place] : last - starts[place]] = block[
                first - at : last - at
            ]
            if last < ends[place]:
                return
            place += 1

    _stream(url, starts[0], ends[-1] - starts[0], None, put, tries)
    return found


def _head(url: str, tries: "Tries") -> Any:
    store, key = _place(url, tries.access)
    while True:
        try:
            return _library().head(store, key)
        except Exception as error:
            tries.failed(error)


def _stream(
    url: str,
    start: int,
    size: int,
    tag: str | None,
    put: Callable[[int, np.ndarray], None],
    tries: "Tries",
) -> None:
    """Has `put` take blocks of a range in their order, each once, with their place in it.

    Args:
        url: of the object.
        start: of the range.
        size: of the range, bytes.
        tag: of the object that all of it must be of; None: what came is compared elsewhere.
        put: takes a place from 0 on, and the bytes there, which must not be kept.
        tries: counts those that broke off; the next one begins where they did.
    """
    store, key = _place(url, tries.access)
    tries.size = size
    while tries.got < size:
        options: dict[str, Any] = {"range": (start + tries.got, start + size)}
        if tag is not None:
            options["if_match"] = tag
        try:
            answer = _library().get(store, key, options=options)
            for each in answer.stream(min_chunk_size=BLOCK):
                block = np.frombuffer(each, np.uint8)
                if tries.got + len(block) > size:
                    raise _Other(f"more than {size:,} bytes")
                put(tries.got, block)
                tries.got += len(block)
            if tries.got < size:
                raise _Other("fewer bytes")
        except Exception as error:
            tries.failed(error)


class _Other(Exception):
    """Another answer than was asked for."""


def _whole(block: Any, size: int) -> np.ndarray:
    found = np.frombuffer(block, np.uint8)
    if len(found) != size:
        raise _Other(f"{len(found):,} bytes in place of {size:,}")
    return found


class Stop:
    """Told to threads that nobody waits for."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set() or not threading.main_thread().is_alive()

    def wait(self, seconds: float) -> None:
        """Until it is set, at most so long."""
        until = time.monotonic() + seconds
        while not self.is_set() and (left := until - time.monotonic()) > 0:
            self._event.wait(min(left, 0.5))  # the program may end meanwhile


class Tries:
    """The tries at one object: waits between them, and says what happened when they are used up."""

    def __init__(self, url: str, access: Access, stop: Stop) -> None:
        self.access = access
        self.got = 0  # bytes that came
        self.size: int | None = None  # of all
        self._url, self._stop = url, stop
        self._count = 0
        self._pauses = 0  # since bytes came
        self._got = 0  # before the last try
        self._began = time.monotonic()

    def failed(self, error: Exception) -> None:
        """Returns when it is time for another try.

        Raises:
            Unreachable: there is none left, or it would not help.
        """
        self._count += 1
        problem = _problem(error, self.access)
        earned = self.got // PROGRESS
        ended = problem.tries is not None and self._count >= problem.tries
        if ended or self._count > self.access.retries + earned or self._stop.is_set():
            kind = Away if problem.tries is None else Unreachable
            if isinstance(error, FileNotFoundError) and _NO_BUCKET not in str(error):
                kind = Missing  # without a bucket no object can be had: no fault of this one
            raise kind(self._line(problem)) from None
        if self.got > self._got:
            self._pauses, self._got = 0, self.got
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._pauses)
        self._pauses += 1
        self._stop.wait(pause * random.uniform(0.5, 1))  # not all at the same moment
        if self._stop.is_set():
            raise Unreachable(self._line(problem)) from None

    def _line(self, problem: "_Problem") -> str:
        part = f" after {self.got:,} of {self.size:,} bytes" if self.got and self.size else ""
        seconds = time.monotonic() - self._began
        tried = f" (tried {self._count} times in {seconds:.0f} s)" if self._count > 1 else ""
        return f"{self._url}: {problem.what}{part}{tried}: {problem.remedy}"


@dataclass(frozen=True)
class _Problem:
    what: str
    remedy: str
    tries: int | None = None  # that make sense; None: all that are allowed


def _problem(error: Exception, access: Access) -> _Problem:
    """What an error of the library means: it tells the kind in its text alone."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = (lines or [type(error).__name__])[0].removeprefix("Generic S3 error: ")
    patience = "raise data.retries to wait longer"
    status = re.search(r"status code: (\d+)", text)
    code = re.search(r"<Code>(.*?)</Code>", text)
    answer = f"{status[1]}{f' {code[1]}' if code else ''}" if status else ""
    if isinstance(error, _Other):
        return _Problem(f"the store answered with {first}", "is something between us and it?")
    if "169.254.169.254" in text or "redential" in first:  # of AWS's machines, their role's
        return _Problem("there are no credentials to ask with", _seen(), 3)
    if _NO_BUCKET in text:
        return _Problem(f"there is no such bucket ({answer or 404})", "check the url", 1)
    if isinstance(error, FileNotFoundError):
        return _Problem(f"there is no such object ({answer or 404})", "check the url", 1)
    refused = status is not None and int(status[1]) in (401, 403)
    if refused or (code is not None and code[1] in _CREDENTIALS):
        return _Problem(f"access was refused ({answer})", _seen(), 1)
    if status and status[1] == "412":
        return _Problem("the object was replaced while it was read", "start again", 1)
    if status and status[1] == "416":
        return _Problem("the object ends before what was asked for", "was it replaced?", 1)
    if status and int(status[1]) // 100 == 3:
        remedy = "is the bucket in another region? set AWS_REGION"
        return _Problem(f"the store sent us elsewhere ({answer})", remedy, 1)
    if status and (int(status[1]) >= 500 or status[1] in ("408", "425", "429")):
        remedy = f"{patience}, or lower data.requests ({access.requests})"
        return _Problem(f"the store answered {answer}", remedy)
    if status:
        return _Problem(f"the store answered {answer}", "check the url and the endpoint", 1)
    if "kind: Connect" in text:
        reason = re.search(r'message: "(.*?)"|error: "(.*?)"', text)
        why = f" ({reason[1] or reason[2]})" if reason else ""
        return _Problem(f"there is no connection to {_endpoint()}{why}", f"is it up? {patience}")
    if "kind: Timeout" in text:
        what = f"not a byte came for {access.timeout_s:g} s"
        return _Problem(what, f"{patience}, or data.timeout_s")
    if "kind: Body" in text or "kind: Interrupted" in text or "IncompleteBody" in text:
        return _Problem("the connection was cut", patience)
    if "UnexpectedRange" in text or "NotPartial" in text:
        return _Problem(f"the store answered with other bytes ({first})", "was it replaced?")
    if "IncompleteMessage" in text or "ConnectionReset" in text or "BrokenPipe" in text:
        return _Problem("the connection was closed without an answer", patience)
    if "Parse(" in text:
        remedy = "is AWS_ENDPOINT_URL that of an object store? with http:// or https:// before it?"
        return _Problem(f"{_endpoint()} does not answer in HTTP", remedy)
    if isinstance(error, UnicodeEncodeError) or "Could not parse path" in text:
        remedy = f"name an object as {SCHEME}bucket/key, without empty parts, '.' or '..'"
        return _Problem("this names no object", remedy, 1)
    return _Problem(f"the store can't be understood ({first[:200]})", patience)


_NO_BUCKET = "NoSuchBucket"
_CREDENTIALS = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    *("AWS_SKIP_SIGNATURE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "HOME"),
)


def _seen() -> str:
    """The variables that say who asks, by name: never what they hold."""
    names = [name for name in _VARIABLES if name != "HOME" and os.environ.get(name)]
    return (
        f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, of someone who may read"
        f" it (seen: {', '.join(names) or 'no AWS_* variable'})"
    )


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _library() -> Any:
    try:
        return importlib.import_module("obstore")
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise ValueError(f"{SCHEME} needs obstore: pip install 'fastssl[s3]'") from None


def _place(url: str, access: Access) -> tuple[Any, str]:
    """The bucket's client, and the object's key in it."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not bucket or not key:
        raise ValueError(f"{url}: name an object as {SCHEME}bucket/key")
    return _client(bucket, access.timeout_s, tuple(map(os.environ.get, _VARIABLES))), key


@lru_cache(maxsize=16)  # one keeps its connections
def _client(bucket: str, timeout_s: float, environment: tuple[str | None, ...]) -> Any:
    """A bucket's client.

    Args:
        bucket: its name.
        timeout_s: without a byte, until a request is given up.
        environment: the values of `_VARIABLES`; others make another client.
    """
    given = dict(zip(_VARIABLES, environment, strict=True))
    if not re.match("https?://[^/]|AWS$", _endpoint()):
        raise ValueError(f"AWS_ENDPOINT_URL ({_endpoint()}) must begin with https:// or http://")
    options = {
        "allow_http": _endpoint().startswith("http://"),
        "connect_timeout": timedelta(seconds=timeout_s),
        "read_timeout": timedelta(seconds=timeout_s),
        "timeout": timedelta(seconds=10 * timeout_s),  # of a request that trickles
    }
    # We try again ourselves, from where it broke off, and can say how often.
    never = {"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)}
    session = _session() if _has_profile(given) else None
    more: dict[str, Any] = {}
    if session is not None:
        more["credential_provider"] = lambda: _credentials(session)
        if session.region_name and not (given["AWS_REGION"] or given["AWS_DEFAULT_REGION"]):
            more["region"] = session.region_name
    make = importlib.import_module("obstore.store").S3Store
    try:
        return make(bucket, client_options=options, retry_config=never, **more)
    except Exception as error:
        why = str(error).splitlines()[0].removeprefix("Generic S3 error: ")
        raise ValueError(f"{SCHEME}{bucket}: {why}: {_seen()}") from None


def _has_profile(given: dict[str, str | None]) -> bool:
    """Whether the user's files of AWS say who asks, and not the variables."""
    if given["AWS_PROFILE"]:
        return True
    if given["AWS_ACCESS_KEY_ID"] or (given["AWS_SKIP_SIGNATURE"] or "").lower() == "true":
        return False
    file = given["AWS_SHARED_CREDENTIALS_FILE"] or os.path.expanduser("~/.aws/credentials")
    return os.path.exists(file)


def _session() -> Any:
    try:
        boto3 = importlib.import_module("boto3")
    except ModuleNotFoundError as error:
        if error.name != "boto3":
            raise
        raise ValueError(
            "AWS_PROFILE and ~/.aws/credentials need boto3: pip install 'fastssl[s3]', or set"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            raise ValueError("it has no credentials")
    except Exception as error:
        named = os.environ.get("AWS_PROFILE") or "default"
        raise ValueError(f"the AWS profile {named}: {str(error).splitlines()[0]}") from None
    return session


def _credentials(session: Any) -> dict[str, Any]:
    """In the library's form; asked for again when they end."""
    found = session.get_credentials().get_frozen_credentials()
    return {
        "access_key_id": found.access_key,
        "secret_access_key": found.secret_key,
        "token": found.token,
        "expires_at": datetime.now(timezone.utc) + timedelta(minutes=15),
    }
