"""Two torchrun agents on loopback, as two machines have one each."""

import socket
import subprocess
from collections.abc import Callable


def two(start: Callable[[int, int], subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of both.

    Args:
        start: of a machine's number, 0 or 1, and the port at which 0 listens: starts its agent, its
            output in a pipe.
    """
    ended = _started(start)
    if "EADDRINUSE" in ended[0][1]:  # another program was given the port in the meantime
        ended = _started(start)
    return ended


def _started(start: Callable[[int, int], subprocess.Popen[str]]) -> list[tuple[int, str]]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    machines = [start(number, port) for number in (0, 1)]
    said = [machines[0].communicate()[0]]
    if "EADDRINUSE" in said[0]:
        machines[1].kill()  # it would wait there
    said.append(machines[1].communicate()[0])
    return [(each.returncode, text) for each, text in zip(machines, said, strict=True)]
