"""What this machine is: cores and memory allowed, versions, GPUs, file systems; plain JSON types.

Read from /proc, the control groups (v1, v2 or none: a container has either) and NVIDIA's management
library (NVML), which asks the driver and never touches CUDA: no context, no memory taken. What is
not there is None or an empty list and says nothing: a laptop without a GPU is no mistake.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

PACKAGES = (
    *("torch", "torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "accelerate", "numpy"),
    *("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),  # DALI's decoders
    *("pillow", "numba", "simplejpeg", "ffcv", "nvidia-ml-py"),
)
SHARED_MEMORY = Path("/dev/shm")
PROC = Path("/proc")


def facts() -> dict[str, Any]:
    """What a figure measured here depends on; plain JSON types, memory in GiB.

    Keys: cpu (model), cores (there are), cores_allowed (by the CPU affinity), cgroup_cpu (cores
    that the quota of the control group comes to, None: no quota), memory_gb, cgroup_memory_gb
    (None: no limit), shm_gb and shm_free_gb (/dev/shm, None: there is none), python, platform,
    versions (by package, None: absent), gpu (one a GPU, see `gpus`).
    """
    shared = shared_memory()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "cgroup_cpu": cgroup_cores(),
        "memory_gb": _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "cgroup_memory_gb": _gib(cgroup_memory()),
        "shm_gb": _gib(shared and shared[0]),
        "shm_free_gb": _gib(shared and shared[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in PACKAGES},
        "gpu": gpus(),
    }


def cores_allowed() -> float:
    """Cores that this process may use: by its CPU affinity and by the quota of control groups."""
    quota = cgroup_cores()
    affinity = float(len(os.sched_getaffinity(0)))
    return affinity if quota is None else min(affinity, quota)


def cgroup_cores(proc: Path = PROC) -> float | None:
    """Cores that the CPU quota of this process's control groups comes to; None without a quota.

    A quota binds everything below it: the smallest on the way up counts.
    """
    quotas = []
    for folder in _cgroup_folders("cpu", proc):
        both = _words(folder / "cpu.max")  # v2: "150000 100000" or "max 100000"
        if not both:  # v1
            both = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(both) == 2 and both[0].isdecimal() and both[1].isdecimal():  # else max, -1
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def cgroup_memory(proc: Path = PROC) -> int | None:
    """Bytes of memory that the control groups allow this process; None without a limit."""
    limits = []
    for folder in _cgroup_folders("memory", proc):
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        # v1 writes "no limit" as the largest number of pages that 64 bits hold
        if words and words[0].isdecimal() and int(words[0]) < 2**60:
            limits.append(int(words[0]))
    return min(limits, default=None)


def shared_memory() -> tuple[int, int] | None:
    """Size of /dev/shm and what is free of it, in bytes; None where there is none."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def cpu_model(proc: Path = PROC) -> str:
    """As the kernel names it; on some ARM machines it has no name but the architecture's."""
    text = _read(proc / "cpuinfo") or ""
    found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def version(package: str) -> str | None:
    """Of an installed package, which is not imported; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_system(path: str | Path, proc: Path = PROC) -> dict[str, Any]:
    """What `path` lies on: type (ext4, nfs4, overlay, ...), device and mount (None: not told)."""
    real = os.path.realpath(path)
    found: _Mount | None = None
    for mount in _mounts(proc):
        inside = real == mount.point or real.startswith(mount.point.rstrip("/") + "/")
        # a later mount on the same place hides the earlier one
        if inside and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    if found is None:
        return {"type": None, "device": None, "mount": None}
    return {"type": found.type, "device": found.device, "mount": found.point}


def gpus() -> list[dict[str, Any]]:
    """The GPUs that the driver tells of, whatever CUDA_VISIBLE_DEVICES says; [] without a driver.

    Keys: name, memory_gb, driver, cuda (the newest that the driver runs), jpeg_engines (hardware
    JPEG decoders), clocks (MHz: sm, sm_most, memory), power_cap_w, mig and ecc (switched on). None
    for each that this driver does not tell of this GPU.
    """
    with _nvml() as is_there:
        if not is_there:
            return []
        driver = _told(pynvml.nvmlSystemGetDriverVersion)
        cuda = _told(pynvml.nvmlSystemGetCudaDriverVersion_v2)  # 13020 is 13.2
        found = []
        for number in range(_told(pynvml.nvmlDeviceGetCount) or 0):
            gpu = _told(lambda n=number: pynvml.nvmlDeviceGetHandleByIndex(n))
            if gpu is not None:
                release = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
                found.append({**_gpu(gpu), "driver": driver, "cuda": release})
        return found


def gpu_memory_mb(device_index: int = 0) -> float | None:
    """MB (1e6 bytes) of GPU memory that this process holds, DALI's included; None without a GPU.

    Where the driver does not tell processes apart (in many containers), what all together hold of
    the GPU.

    Args:
        device_index: as torch counts: among CUDA_VISIBLE_DEVICES.
    """
    with _nvml() as is_there:
        gpu = _visible(device_index) if is_there else None
        if gpu is None:
            return None
        processes = _told(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)) or []
        for process in processes:
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return process.usedGpuMemory / 1e6
        memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu))
        return None if memory is None else memory.used / 1e6


# ---- NVML ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nvml() -> Iterator[bool]:
    """Opens the library; False where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _told(ask: Callable[[], Any]) -> Any:
    """The answer, or None: a driver need not know a question, nor a GPU have what is asked for."""
    try:
        return ask()
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, UnicodeDecodeError):
        return None


def _gpu(gpu: Any) -> dict[str, Any]:
    name = _told(lambda: pynvml.nvmlDeviceGetName(gpu))
    memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu))
    sm, in_memory = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    power = _told(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu))  # mW
    mig = _told(lambda: pynvml.nvmlDeviceGetMigMode(gpu))  # now, after the next reset
    ecc = _told(lambda: pynvml.nvmlDeviceGetEccMode(gpu))
    return {
        "name": name,
        "memory_gb": None if memory is None else _gib(memory.total),
        "jpeg_engines": _jpeg_engines(gpu),
        "clocks": {
            "sm": _told(lambda: pynvml.nvmlDeviceGetClockInfo(gpu, sm)),
            "sm_most": _told(lambda: pynvml.nvmlDeviceGetMaxClockInfo(gpu, sm)),
            "memory": _told(lambda: pynvml.nvmlDeviceGetClockInfo(gpu, in_memory)),
        },
        "power_cap_w": None if power is None else power / 1000,
        "mig": None if mig is None else bool(mig[0]),
        "ecc": None if ecc is None else bool(ecc[0]),
    }


def _jpeg_engines(gpu: Any) -> int | None:
    """As many as the largest slice may have that the GPU can be cut into; NVML tells it only so.

    GPUs that can't be cut (GeForce, T4) are not told of; the A100 is told to have 1, the H100 7.
    """
    engines = []
    for profile in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        for layout in (2, 1):  # of the answer; older drivers know the first only
            info = _told(
                lambda p=profile, v=layout: pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, p, v)
            )
            if info is not None:
                engines.append(int(info.jpegCount))
                break
    return max(engines, default=None)


def _visible(device_index: int) -> Any:
    """The GPU that torch counts as `device_index`, or None.

    CUDA puts faster ones first unless CUDA_DEVICE_ORDER says PCI_BUS_ID, as NVML does: on a machine
    of different GPUs the two may differ, and only an UUID tells for certain.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = str(device_index)
    if listed is not None:
        names = [each.strip() for each in listed.split(",")]
        if device_index >= len(names):
            return None
        name = names[device_index]
    if name.isdecimal():
        return _told(lambda: pynvml.nvmlDeviceGetHandleByIndex(int(name)))
    return _told(lambda: pynvml.nvmlDeviceGetHandleByUUID(name)) if name[:1].isalpha() else None


# ---- /proc --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mount:
    root: str  # the folder of the file system that is seen at `point`
    point: str
    type: str
    device: str
    options: tuple[str, ...]  # of the file system: for control groups v1 the controllers


def _mounts(proc: Path) -> list[_Mount]:
    """All mounts, by proc(5): `36 35 98:0 /root /point rw,noatime [...] - type device rw`."""
    mounts = []
    for line in (_read(proc / "self" / "mountinfo") or "").splitlines():
        before, separator, after = line.partition(" - ")
        first, last = before.split(" "), after.split(" ")
        if separator and len(first) >= 5 and len(last) >= 2:
            words = tuple(last[2].split(",")) if len(last) > 2 else ()
            mounts.append(
                _Mount(_plain(first[3]), _plain(first[4]), last[0], _plain(last[1]), words)
            )
    return mounts


def _cgroup_folders(controller: str, proc: Path) -> list[Path]:
    """Folders of the control groups that this process is in, from its own up to the topmost seen.

    Both of v1 (one tree a controller) and of v2 (one tree for all), as a machine may have both.
    """
    paths = {}  # controller, "" for v2 -> the process's group
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    folders: list[Path] = []
    for mount in _mounts(proc):
        if mount.type == "cgroup" and controller in mount.options:
            path = paths.get(controller)
        elif mount.type == "cgroup2":
            path = paths.get("")
        else:
            continue
        # A container sees its group as the top of the tree, but may be told its path outside.
        inside = os.path.relpath(path, mount.root) if path and mount.root != path else "."
        folder = Path(mount.point)
        if not inside.startswith(".."):
            folder = folder / inside
        while folder.is_relative_to(mount.point):
            folders.append(folder)
            folder = folder.parent
    return list(dict.fromkeys(folders))


def _plain(text: str) -> str:
    r"""Without the escapes of mountinfo: a blank is \040."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def _words(path: Path) -> list[str]:
    return (_read(path) or "").split()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)
