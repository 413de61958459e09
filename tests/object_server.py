"""An object store on loopback: moto's server in a process of its own, and a proxy with faults."""

import http.client
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3

BUCKET = "pictures"
KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}


@contextmanager
def store(folder: Path) -> Iterator[str]:
    """The endpoint of a new server with an empty bucket; `folder` takes what it prints."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with open(folder / "moto.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
    try:
        endpoint = _endpoint(process, folder / "moto.log")
        with client(endpoint) as speaker:
            speaker.create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        process.terminate()
        process.wait()


@contextmanager
def client(endpoint: str, service: str = "s3") -> Iterator[Any]:
    """Another program that speaks to the store: boto3."""
    speaker = boto3.client(
        service,
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    try:
        yield speaker
    finally:
        speaker.close()


def upload(endpoint: str, folder: Path, prefix: str) -> None:
    """All files of a folder, under `prefix`."""
    with client(endpoint) as speaker:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                key = f"{prefix}/{file.relative_to(folder).as_posix()}"
                speaker.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())


class Proxy:
    """Between a reader and the store: passes requests on, or does what `fault` says.

    Attributes:
        endpoint: to speak to.
        requests: method, path and range of those that came.
        signed: the headers that say who asked.
        busy: called with a request's number and path while it is answered.
        fault: of a request's number, from 0 on, and its path: None, or one of
            "500", "503", "403", "404": this status
            "close": the connection, without an answer
            "hang": neither answers nor ends
            "slow": waits 0.05 s
            "cut": sends a random part of the body and closes; "cut 100": so many bytes of it
            "stall": sends half of the body, and no more
            "short", "long": a byte less or more than the range, and says so
            "whole": the whole object, whatever range was asked for
            "flip": changes one byte of the body
            "garbage": no HTTP
    """

    def __init__(self, store: str) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self.signed: list[str] = []
        self.fault: Callable[[int, str], str | None] = lambda number, path: None
        self.busy: Callable[[int, str], None] = lambda number, path: None
        self._store = store.removeprefix("http://")
        self._lock = threading.Lock()
        self._random = random.Random(7)
        self._ended = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def do_GET(self) -> None:
                proxy.answer(self)

            def do_HEAD(self) -> None:
                proxy.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # whoever hung up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range", "")
        with self._lock:
            number = len(self.requests)
            self.requests.append((request.command, request.path, asked))
            self.signed.append(request.headers.get("Authorization", ""))
            fault = self.fault(number, request.path) or ""
            some = self._random.random()
        self.busy(number, request.path)
        if fault in ("500", "503", "403", "404"):
            self._refuse(request, int(fault))
            return
        if fault == "close":
            request.close_connection = True
            return
        if fault == "hang":
            self._ended.wait(30)
            request.close_connection = True
            return
        if fault == "garbage":
            request.wfile.write(b"\x00\x01 what is this?\r\n\r\n")
            request.close_connection = True
            return
        if fault == "slow":
            time.sleep(0.05)
        headers = {name.lower(): value for name, value in request.headers.items()}
        if fault == "whole":
            headers.pop("range", None)
            asked = ""
        if fault in ("short", "long") and asked:
            first, last = asked.removeprefix("bytes=").split("-")
            headers["range"] = f"bytes={first}-{int(last) + (1 if fault == 'long' else -1)}"
        status, found, body = self._pass_on(request, headers)
        if fault == "flip" and body:
            place = int(some * len(body))
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        sent = len(body)
        if fault.startswith("cut"):
            sent = int(fault[4:] or some * len(body))
        if fault == "stall":
            sent = len(body) // 2
        request.send_response_only(status)
        for name, value in found:
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[:sent])
            request.wfile.flush()
        if sent < len(body):
            if fault == "stall":
                self._ended.wait(30)
            request.close_connection = True

    def _refuse(self, request: BaseHTTPRequestHandler, status: int) -> None:
        code = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied", 404: "NoSuchKey"}
        body = f"<Error><Code>{code[status]}</Code></Error>".encode()
        request.send_response_only(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def _pass_on(
        self, request: BaseHTTPRequestHandler, headers: dict[str, str]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._store, timeout=60)
        try:
            connection.request(request.command, request.path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PYTHON"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def _endpoint(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Where it listens, as it says itself: a port that it was given nobody else can take."""
    deadline = time.monotonic() + 300  # moto's import alone has been seen to take 25 s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        told = re.search(r"Running on (http://127\.0\.0\.1:\d+)\b", log.read_text())
        if told is not None:
            return told[1]
        time.sleep(0.1)
    raise AssertionError(f"moto did not start: {log.read_text()[-2000:]}")
