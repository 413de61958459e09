"""Mends two things that `accelerate launch` (1.15) does on the way to train.py.

It says that it starts several CPU processes and starts one, and it dies of a signal without passing
it on. Nothing happens under torchrun, or when train.py is run by hand. Also: how torchrun is
started on one machine.
"""

import ctypes
import os
import signal
import sys

import psutil


def mend() -> None:
    """To be called first by a script: returns, or replaces this process by torchrun."""
    if "ACCELERATE_DYNAMO_BACKEND" not in os.environ:
        return  # not started by accelerate
    _end_with_launcher()
    # With --cpu (or no GPU) and --num_processes above 1 it leaves the start to MPI: it sets the
    # address at which the processes should meet and runs the script once.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and not _under_mpi():
        _start_them_all()


def torchrun(processes: int | str) -> list[str]:
    """What python is to be given, before a script, to start processes on this machine alone.

    They meet on loopback: by default torchrun gives them the machine's name, and where that leads
    nowhere they look for each other for minutes.
    """
    here = ["--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={processes}"]
    return ["-m", "torch.distributed.run", *here]


def _end_with_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher ends.

    The launcher dies of a SIGTERM without passing it on, and of Ctrl-C before a checkpoint can be
    written: training would go on unseen, and a second start find its run folder taken.
    """
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG, of <linux/prctl.h>
        ctypes.CDLL(None).prctl(death_signal, int(signal.SIGTERM))


def _start_them_all() -> None:
    command = psutil.Process(os.getppid()).cmdline()
    processes = _value(command, "num_processes")
    if processes is None or (_value(command, "num_machines") or "1") != "1":
        sys.exit(
            "error: accelerate launch was asked for several CPU processes and starts only one; "
            f"start them with: torchrun --nproc_per_node N {' '.join(sys.argv)}"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # torchrun finds a free port of its own
        del os.environ[name]
    os.execv(sys.executable, [sys.executable, *torchrun(processes), *sys.argv])


def _value(command: list[str], flag: str) -> str | None:
    """The value of --flag in a command line, with _ or -, as --flag N or --flag=N."""
    for spelling in (f"--{flag}", f"--{flag.replace('_', '-')}"):
        for word, after in zip(command, [*command[1:], ""], strict=True):
            if word == spelling:
                return after
            if word.startswith(f"{spelling}="):
                return word.split("=", 1)[1]
    return None


def _under_mpi() -> bool:
    return any(name.startswith(("PMI_", "OMPI_", "MV2_", "MPI_")) for name in os.environ)
