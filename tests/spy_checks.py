"""Checks that end badly, for the children of the doctor: imports little, to be quick."""

import os
import signal
import time

from fastssl.doctor import Line


def check_killed(asked):
    yield Line("ok", "before", "this much is known")
    asked["say"]("waiting for a signal")
    os.kill(os.getpid(), signal.SIGSEGV)


def check_hanging(asked):
    time.sleep(60)
    yield Line("ok", "never", "")


def check_broken(asked):
    yield Line("ok", "before", asked["word"])
    raise ZeroDivisionError("of our own")
