"""Whether fastssl can work here, line by line: ok, note, or FAIL with the remedy.

    python -m fastssl.doctor [RECIPE [section.key=value ...]]

Without a recipe: packages, GPUs, cores and memory. With one, also: the recipe, its images, the
disk, the first batch, and whether the loader or the step is the limit. Takes less than a minute
and is fit to paste into a bug report. Exit codes: 0 nothing failed, 1 something did, 2 misuse.

What loads foreign native code runs in a child process, so that a crash is a line like any other.
"""

import importlib.util
import io
import json
import os
import platform
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fastssl

USAGE = "usage: python -m fastssl.doctor [RECIPE [section.key=value ...]]"
STATES = ("ok", "note", "FAIL")
SILENCE = 180.0  # seconds without a word, after which a check is taken to hang

NEEDED = {  # module: what pip calls it
    **{"accelerate": "accelerate", "numba": "numba", "numpy": "numpy", "PIL": "pillow"},
    **{"psutil": "psutil", "pydantic": "pydantic", "pynvml": "nvidia-ml-py", "rich": "rich"},
    **{"safetensors": "safetensors", "torch": "torch", "torchvision": "torchvision"},
    **{"nvidia.dali": "nvidia-dali-cuda120", "yaml": "pyyaml"},
}
DALI = {"nvidia-dali-cuda120": (525, 60), "nvidia-dali-cuda130": (580,)}  # oldest driver of a wheel
NATIVE = ("torch", "torchvision", "DALI")  # without these no recipe can be looked at
OLDEST_DALI = (2, 2)
SMALL_SHM = 1.0  # GiB
SMALL_MEMORY = 4.0  # GiB: torch, DALI and a ResNet take about two


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    state: Literal["ok", "note", "FAIL"]
    what: str
    text: str  # what was found; after it, unless ok, the remedy

    def __str__(self) -> str:
        return f"{self.state:<5} {fit_to_paste(f'{self.what}: {self.text}')}"


def main(arguments: Sequence[str]) -> int:
    """Prints the report; returns the exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\n{USAGE}")
        return 0
    strange = next((each for each in arguments if each.startswith("-")), None)
    if strange is not None or (arguments and _is_override(arguments[0])):
        found = f"unknown option {strange}" if strange else f"{arguments[0]} comes before a recipe"
        print(f"error: {found}\n{USAGE}", file=sys.stderr)
        return 2
    failed = seen = 0
    try:
        for line in examine(arguments[0] if arguments else None, arguments[1:]):
            seen += 1
            failed += line.state == "FAIL"
            print(line, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"\n{failed} of {seen} lines failed" if failed else "\nnothing failed")
    return 1 if failed else 0


def examine(recipe: str | None, overrides: Sequence[str]) -> Iterator[Line]:
    """All lines, each as soon as it is known."""
    yield from guarded("fastssl", check_fastssl)
    missing = [name for name in NEEDED if not _is_there(name)]
    for name in missing:
        remedy = "make setup, or pip install -e . in the checkout"
        yield Line("FAIL", NEEDED[name], f"is not installed: {remedy}")
    if "pynvml" in missing:
        return

    # Not at the top: what it needs may be missing, which has been told by now.
    from fastssl import machine  # noqa: PLC0415

    facts = machine.facts()
    checks: tuple[tuple[str, Callable[[dict[str, Any]], Iterator[Line]]], ...] = (
        *(("packages", check_packages), ("GPU", check_gpus), ("cores", check_cores)),
        *(("memory", check_memory), ("shared memory", check_shared_memory)),
    )
    for name, check in checks:
        yield from guarded(name, check, facts)
    usable = not missing
    for module, what, check in (
        ("torch", "torch", "check_torch"),
        ("nvidia.dali", "DALI", "check_dali"),
    ):
        if module in missing:
            continue
        for line in in_child(what, "fastssl.doctor", check, facts):
            usable = usable and (line.state != "FAIL" or line.what not in NATIVE)
            yield line
    if recipe is None:
        text = "none given: `python -m fastssl.doctor recipes/pirl_jigsaw.yaml` tries data, loader"
        yield Line("note", "recipe", f"{text} and step, too")
    elif not usable:
        yield Line("note", "recipe", "not looked at before the packages above can be imported")
    else:
        asked = {"path": recipe, "overrides": list(overrides)}
        yield from in_child("recipe", "fastssl.doctor_recipe", "check_recipe", asked)


def guarded(what: str, check: Callable[..., Iterator[Line]], *arguments: Any) -> Iterator[Line]:
    """The check's lines; one that breaks is a FAIL of its own that names the exception."""
    try:
        yield from check(*arguments)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}, line {last.lineno}"
        yield Line(
            "FAIL",
            what,
            f"the check broke: {named(error)} ({place}): please report it with these lines",
        )


def named(error: BaseException) -> str:
    """The exception in one line of bearable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def fit_to_paste(text: str) -> str:
    """One line of plain characters, without the home folder's name or a password in an address."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", " ".join(text.split()))
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    text = re.sub(r"://[^/@\s]+@", "://***@", text)
    for home in {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))} - {"/"}:
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    return text


# ---- What can be told without loading anything ---------------------------------------------------


def check_fastssl() -> Iterator[Line]:
    """Version, commit and Python."""
    commit = _git("rev-parse", "--short", "HEAD")
    state = ""
    if commit and (Path(__file__).resolve().parents[1] / ".git").exists():
        changed = _git("status", "--porcelain", "--untracked-files=no")
        state = f", commit {commit}{' and changes' if changed else ''}"
    yield Line("ok", "fastssl", f"{fastssl.__version__}{state}")
    python = f"Python {platform.python_version()}, {platform.platform()}"
    if (3, 10) <= sys.version_info < (3, 14):
        yield Line("ok", "system", python)
    else:
        yield Line("FAIL", "system", f"{python}: fastssl needs Python 3.10 to 3.13: another venv")


def check_packages(facts: dict[str, Any]) -> Iterator[Line]:
    """Versions, and DALI wheels that do not go with each other or with the driver."""
    versions: dict[str, str | None] = facts["versions"]
    listed = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    yield Line("ok", "versions", listed)
    wheels = [name for name in DALI if versions.get(name)]
    if len(wheels) > 1:
        yield Line(
            "FAIL",
            "DALI",
            f"{' and '.join(wheels)} are both installed, over each other in one folder: "
            f"pip uninstall -y {' '.join(wheels)}, then pip install one of them",
        )
    for wheel in wheels:
        if numbers(versions[wheel]) < OLDEST_DALI:
            yield Line(
                "FAIL",
                "DALI",
                f"{versions[wheel]} is older than 2.2: pip install -U '{wheel}>=2.2'",
            )
        for number, gpu in enumerate(facts["gpu"]):
            if gpu["driver"] is not None and numbers(gpu["driver"]) < DALI[wheel]:
                oldest = ".".join(map(str, DALI[wheel]))
                other = " or pip install nvidia-dali-cuda120 in its place" if "130" in wheel else ""
                yield Line(
                    "FAIL",
                    f"GPU {number}",
                    f"driver {gpu['driver']} is older than {oldest}, which {wheel} needs: "
                    f"install a newer driver{other}",
                )


def check_gpus(facts: dict[str, Any]) -> Iterator[Line]:
    """The GPUs as the driver tells of them, and their JPEG engines."""
    if not facts["gpu"]:
        if _on_the_bus():
            yield Line(
                "note",
                "GPU",
                "an NVIDIA GPU is there, but no driver answers: install one (at least 525.60), "
                "reboot after an update of it, or start the container with --gpus all",
            )
        else:
            yield Line("ok", "GPU", "none: everything runs on the CPU")
    for number, gpu in enumerate(facts["gpu"]):
        clocks = gpu["clocks"]
        yield Line(
            "ok",
            f"GPU {number}",
            f"{gpu['name']}, {gpu['memory_gb']} GiB, driver {gpu['driver']} (up to CUDA "
            f"{gpu['cuda']}), {clocks['sm']} of {clocks['sm_most']} MHz, {gpu['power_cap_w']} W",
        )
        engines = gpu["jpeg_engines"]
        if engines is None:
            yield Line("note", f"GPU {number} JPEG engines", "not told by this driver of this GPU")
        elif engines == 0:
            yield Line("ok", f"GPU {number} JPEG engines", "none: its other units decode")
        else:
            yield Line("ok", f"GPU {number} JPEG engines", f"{engines} (loader.hw_decoder_load)")
        if gpu["mig"]:
            yield Line(
                "note",
                f"GPU {number}",
                "is cut into slices (MIG): a slice has a part of the memory and perhaps no JPEG "
                "engine, and a process sees one slice; whole GPUs load faster",
            )
    capabilities = os.environ.get("NVIDIA_DRIVER_CAPABILITIES")  # set in containers
    if facts["gpu"] and capabilities and not {"video", "all"} & {*capabilities.split(",")}:
        yield Line(
            "note",
            "GPU",
            f"this container may use {capabilities} only, not the JPEG engines: start it with "
            "-e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
        )


def check_cores(facts: dict[str, Any]) -> Iterator[Line]:
    """Cores that this process may use, against those there are."""
    cores, allowed, quota = facts["cores"], facts["cores_allowed"], facts["cgroup_cpu"]
    found = f"{facts['cpu']}: {allowed} of {cores} allowed"
    if allowed == 1 and cores > 1:
        yield Line(
            "FAIL",
            "cores",
            f"{found}: decoding and training share one; give more (taskset, srun --cpus-per-task, "
            "the container's --cpuset-cpus; OMP_PROC_BIND and KMP_AFFINITY must not be set)",
        )
    elif quota is not None and quota < allowed:
        yield Line(
            "note",
            "cores",
            f"{found}, but a quota of {quota:g} at a time: loader threads are counted by it; "
            f"raise it (the container's --cpus), or set OMP_NUM_THREADS={max(1, int(quota))}",
        )
    else:
        yield Line("ok", "cores", found)
    per_gpu = min(allowed, quota or allowed) / max(1, len(facts["gpu"]))
    if facts["gpu"] and per_gpu < 4:
        yield Line(
            "note",
            "cores",
            f"{per_gpu:g} for each GPU: decoding on the GPU keeps 4 busy; ask for more",
        )


def check_memory(facts: dict[str, Any]) -> Iterator[Line]:
    """What the machine has and the control group leaves."""
    limit = facts["cgroup_memory_gb"]
    allowed = facts["memory_gb"] if limit is None else min(facts["memory_gb"], limit)
    text = f"{facts['memory_gb']} GiB" + ("" if limit is None else f", {limit} allowed")
    if allowed < SMALL_MEMORY:
        remedy = "give the job or container more, or train small images in small batches"
        yield Line("note", "memory", f"{text}: torch and DALI alone take about two; {remedy}")
    else:
        yield Line("ok", "memory", text)


def check_shared_memory(facts: dict[str, Any]) -> Iterator[Line]:
    """/dev/shm: NCCL needs it for several GPUs, and torch's DataLoader for its workers."""
    size, free = facts["shm_gb"], facts["shm_free_gb"]
    if size is None:
        found = "there is no /dev/shm"
    elif free < SMALL_SHM:
        found = f"/dev/shm has {free} GiB free of {size}"
    else:
        yield Line("ok", "shared memory", f"{free} GiB free of {size}")
        return
    remedy = "start the container with --shm-size=8g or --ipc=host, or clear /dev/shm"
    if len(facts["gpu"]) > 1:
        yield Line("FAIL", "shared memory", f"{found}, too little for several GPUs: {remedy}")
    else:
        why = "only torch's DataLoader workers (python -m benchmarks tasks) need more"
        yield Line("note", "shared memory", f"{found}: {why}; {remedy}")


# ---- What imports torch or DALI: in a child process ----------------------------------------------


def check_torch(facts: dict[str, Any]) -> Iterator[Line]:
    """Imports torch and torchvision, and compares torch's GPUs with the driver's."""
    cores = len(os.sched_getaffinity(0))
    # In here because it may not be importable at all, and that is a line of the report.
    try:
        import torch  # noqa: PLC0415

        torch.ones(256, 256).mm(torch.ones(256, 256))  # starts its threads
    except (ImportError, OSError, RuntimeError) as error:
        remedy = "pip install --force-reinstall torch torchvision"
        yield Line("FAIL", "torch", f"can't be imported: {named(error)}: {remedy}")
        return
    cuda = torch.version.cuda
    built = "without CUDA" if cuda is None else f"for CUDA {cuda}"
    yield Line("ok", "torch", f"{torch.__version__}, built {built}")
    if len(os.sched_getaffinity(0)) < cores:
        yield Line(
            "FAIL",
            "cores",
            f"importing torch takes {cores} cores down to {len(os.sched_getaffinity(0))}, for the "
            "loader's threads, too: unset OMP_PROC_BIND, GOMP_CPU_AFFINITY and KMP_AFFINITY",
        )
    yield from _torchvision(str(torch.__version__))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    why = " ".join(str(each.message) for each in told)
    yield from check_visible(facts, cuda, count, why, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _torchvision(torch_version: str) -> Iterator[Line]:
    """A torchvision made for another torch fails at its import or at its first operator."""
    try:
        import torch  # noqa: PLC0415  as in check_torch
        import torchvision  # noqa: PLC0415  as in check_torch

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, OSError, RuntimeError) as error:
        index = ""
        if "+" in torch_version:  # 2.13.0+cpu from pytorch.org and torchvision from PyPI
            build = torch_version.split("+")[1]
            index = f" --index-url https://download.pytorch.org/whl/{build}"
        yield Line(
            "FAIL",
            "torchvision",
            f"is not made for torch {torch_version}: {named(error)}: install both together: "
            f"pip install --force-reinstall torch torchvision{index}",
        )
    else:
        yield Line("ok", "torchvision", str(torchvision.__version__))


def check_visible(
    facts: dict[str, Any], cuda: str | None, count: int, why: str, visible: str | None
) -> Iterator[Line]:
    """Whether torch sees the GPUs that the driver tells of.

    Args:
        facts: of the machine.
        cuda: that torch was built for; None: without.
        count: GPUs that torch sees.
        why: what it warned of when asked.
        visible: CUDA_VISIBLE_DEVICES.
    """
    there = len(facts["gpu"])
    if not there:
        return
    driver, newest = facts["gpu"][0]["driver"], facts["gpu"][0]["cuda"]
    if cuda is None:
        yield Line(
            "FAIL",
            "GPU",
            f"torch is built without CUDA, so the {there} GPUs stay idle: pip uninstall -y torch "
            "torchvision && pip install torch torchvision",
        )
    elif count == 0 and visible is not None and visible.strip() in ("", "-1"):
        yield Line("note", "GPU", f"hidden by CUDA_VISIBLE_DEVICES='{visible}': unset it to use it")
    elif count == 0:
        if newest is not None and numbers(newest)[:1] < numbers(cuda)[:1]:
            remedy = (
                f"driver {driver} runs CUDA up to {newest} and torch is built for {cuda}: a newer "
                "driver, or a torch for an older CUDA (https://pytorch.org/get-started/locally)"
            )
        else:
            remedy = (
                "check CUDA_VISIBLE_DEVICES, the permissions of /dev/nvidia*, and that the "
                "container was started with --gpus all"
            )
        said = f" ({why})" if why else ""
        yield Line("FAIL", "GPU", f"the driver tells of {there}, torch sees none{said}: {remedy}")
    elif count < there and visible is None:
        yield Line(
            "note",
            "GPU",
            f"torch sees {count} of {there}: check MIG and the permissions of /dev/nvidia*",
        )
    else:
        yield Line("ok", "GPU", f"torch sees {count} of {there}")


def check_dali(facts: dict[str, Any]) -> Iterator[Line]:
    """Imports DALI and decodes a JPEG with it, on the CPU and where there is one on the GPU."""
    # In here because it may not be importable at all, and that is a line of the report.
    try:
        import nvidia.dali  # noqa: PLC0415
    except (ImportError, OSError, RuntimeError) as error:
        yield Line(
            "FAIL",
            "DALI",
            f"can't be imported: {named(error)}: pip install --force-reinstall "
            "'nvidia-dali-cuda120>=2.2,<3' (Linux, Python 3.10 to 3.13)",
        )
        return
    yield from _decodes("cpu", nvidia.dali.__version__)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if facts["gpu"] and not hidden:
        yield from _decodes("mixed", nvidia.dali.__version__)


def _decodes(device: Literal["cpu", "mixed"], version: str) -> Iterator[Line]:
    import numpy as np  # noqa: PLC0415  as in check_dali
    from nvidia.dali import fn  # noqa: PLC0415  as in check_dali
    from nvidia.dali.pipeline import Pipeline  # noqa: PLC0415  as in check_dali
    from PIL import Image  # noqa: PLC0415  as in check_dali

    where = "on the CPU" if device == "cpu" else "on GPU 0"
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(file, "JPEG", quality=90)
    encoded = np.frombuffer(file.getvalue(), np.uint8)
    number: Any = None if device == "cpu" else 0
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=number)
    try:
        with pipeline:
            pixels = fn.decoders.image(fn.external_source(lambda: [encoded]), device=device)
            pipeline.set_outputs(pixels.gpu().cpu() if device == "mixed" else pixels)
        (output,) = pipeline.run()
        shape = np.asarray(output.as_tensor()).shape
    except RuntimeError as error:
        remedy = (
            "reinstall DALI"
            if device == "cpu"
            else "check the driver; loader.decoder=cpu does without"
        )
        yield Line(
            "FAIL", "DALI", f"{version} can't decode a JPEG {where}: {named(error)}: {remedy}"
        )
        return
    assert shape == (1, 48, 64, 3), shape
    yield Line("ok", "DALI", f"{version} decodes a JPEG {where}")


# ---- Child processes ----------------------------------------------------------------------------

# A new interpreter told what to do in a line, with the search path of this one.
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from fastssl import doctor
from {module} import {check} as check
doctor.answer(check, *sys.argv[2:])
"""


def in_child(
    what: str, module: str, check: str, argument: dict[str, Any], silence: float = SILENCE
) -> Iterator[Line]:
    """The lines of `module`.`check`(`argument`), run in a process of its own.

    Its words to the reader in between go to stderr. A child that is killed by a signal, or silent
    for longer than `silence` seconds, is a FAIL.
    """
    read, write = os.pipe()
    with tempfile.TemporaryFile() as noise:
        given = [json.dumps(sys.path), json.dumps(argument), str(write)]
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(module=module, check=check), *given],
            stdin=subprocess.DEVNULL,
            stdout=noise,
            stderr=noise,
            pass_fds=[write],
            env={"OMP_WAIT_POLICY": "passive", **os.environ},  # as in train.py
        )
        os.close(write)
        seen = 0
        try:
            for state, name, text in _messages(read, silence):
                if state in STATES:
                    seen += 1
                    yield Line(state, name, text)
                else:
                    print(fit_to_paste(text), file=sys.stderr, flush=True)
            code = child.wait(timeout=silence)
        except (TimeoutError, subprocess.TimeoutExpired):
            yield Line(
                "FAIL",
                what,
                f"silent for {silence:g} s and ended by the doctor: look for a file system or a "
                "driver that does not answer (dmesg)",
            )
            return
        finally:
            os.close(read)
            child.kill()
            child.wait()
        if code or not seen:
            noise.seek(0)
            said = noise.read().decode(errors="replace").strip().splitlines()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            last = f"; its last words: {said[-1][:300]}" if said else ""
            remedy = "more memory may help" if code == -signal.SIGKILL else "please report it"
            yield Line("FAIL", what, f"the check was {how} after {seen} lines{last}: {remedy}")


def answer(check: Callable[..., Iterator[Line]], argument: str, descriptor: str) -> None:
    """In the child: runs the check and writes its lines, one JSON list each."""
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as pipe:

        def send(*message: str) -> None:
            print(json.dumps(message), file=pipe, flush=True)

        asked = json.loads(argument)
        asked["say"] = lambda text: send("says", "", text)  # what it is waiting for
        for line in guarded(check.__name__, check, asked):
            send(line.state, line.what, line.text)


def _messages(descriptor: int, silence: float) -> Iterator[list[Any]]:
    """What the child writes until it ends; TimeoutError after `silence` seconds without a word."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(silence):
                raise TimeoutError
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return
            *whole, rest = (rest + chunk).split(b"\n")
            for each in whole:
                yield json.loads(each)


# ---- Small things -------------------------------------------------------------------------------


def numbers(version: str | None) -> tuple[int, ...]:
    """The leading numbers of a version, to compare: 525.60.13 and 2.13.0+cpu alike."""
    found = re.match(r"\d+(?:\.\d+)*", version or "")
    return tuple(map(int, found[0].split("."))) if found else ()


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _is_override(argument: str) -> bool:
    return "=" in argument and not Path(argument).exists()


def _on_the_bus() -> bool:
    """Whether an NVIDIA display controller is among the PCI devices; a container sees them, too."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
