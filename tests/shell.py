"""What the tests see of the shell that started them; conftest.py sees to it before all else.

What they find does not depend on a launcher or a scheduler around them, on somebody's account, or
on the user's own code, libraries and looks. CUDA_VISIBLE_DEVICES stays: other GPUs may be taken.
"""

import os

_FOREIGN = ("PYTHON", "LD_PRELOAD", "TORCH", "GLOO_", "NCCL_", "OMP_", "KMP_")
_FOREIGN += ("ACCELERATE_", "PET_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_")
_FOREIGN += ("SLURM_", "PMI", "OMPI_", "MPI_", "MV2_", "AWS_")
_FOREIGN += ("FORCE_COLOR", "NO_COLOR", "TTY_", "COLUMNS", "LINES")
_OWN = {
    "OMP_NUM_THREADS": "1",  # sums of several threads need not be the same twice
    "OMP_WAIT_POLICY": "passive",  # as in train.py
    "LOKY_MAX_CPU_COUNT": str(len(os.sched_getaffinity(0))),  # else it warns where it cannot count
    "PET_LOCAL_ADDR": "127.0.0.1",  # torchrun's; else this machine's name, which may lead nowhere
    "GLOO_SOCKET_IFNAME": "lo",  # else warns of such a name
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)} | _OWN
