import json
import os
from pathlib import Path

import pytest

from fastssl import machine


def tree(folder: Path, files: dict[str, str]) -> Path:
    """A /proc and control groups made of files; {} in a text stands for the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{}", str(folder)))
    return folder / "proc"


V2 = "31 23 0:28 / {}/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / {}/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / {}/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def test_facts_are_json_and_name_what_a_figure_depends_on():
    facts = machine.facts()

    assert json.loads(json.dumps(facts)) == facts
    assert facts.keys() == {
        *("cpu", "cores", "cores_allowed", "cgroup_cpu", "memory_gb", "cgroup_memory_gb"),
        *("shm_gb", "shm_free_gb", "python", "platform", "versions", "gpu"),
    }
    assert {"torch", "torchvision", "nvidia-dali-cuda120", "ffcv"} <= facts["versions"].keys()
    assert facts["versions"]["torch"] is not None
    assert facts["memory_gb"] > 0.1
    assert 1 <= facts["cores_allowed"] <= facts["cores"]


def test_cores_allowed_never_exceed_the_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert 0 < machine.cores_allowed() <= 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_quota_of_control_groups_v2_is_the_least_on_the_way_up(tmp_path):
    proc = tree(
        tmp_path,
        {
            "proc/self/mountinfo": V2,
            "proc/self/cgroup": "0::/pod/box\n",
            "cgroup/pod/box/cpu.max": "max 100000\n",
            "cgroup/pod/cpu.max": "150000 100000\n",
            "cgroup/pod/box/memory.max": "4294967296\n",
            "cgroup/pod/memory.max": "max\n",
        },
    )

    assert machine.cgroup_cores(proc) == 1.5
    assert machine.cgroup_memory(proc) == 4 * 2**30


def test_a_quota_of_control_groups_v1_is_read_where_docker_shows_the_path_outside(tmp_path):
    proc = tree(
        tmp_path,
        {
            "proc/self/mountinfo": V1.replace(" / ", " /docker/3f "),
            "proc/self/cgroup": "8:memory:/docker/3f\n4:cpu,cpuacct:/docker/3f\n",
            "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
            "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cgroup/memory/memory.limit_in_bytes": "1073741824\n",
        },
    )

    assert machine.cgroup_cores(proc) == 3
    assert machine.cgroup_memory(proc) == 2**30


@pytest.mark.parametrize("path", ["/", "/../outside"])
def test_no_limit_is_none(tmp_path, path):
    proc = tree(
        tmp_path,
        {
            "proc/self/mountinfo": V1 + V2,
            "proc/self/cgroup": f"8:memory:{path}\n4:cpu,cpuacct:{path}\n0::{path}\n",
            "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/cpu.max": "max 100000\n",
            "cgroup/memory.max": "max\n",
        },
    )

    assert machine.cgroup_cores(proc) is None
    assert machine.cgroup_memory(proc) is None


def test_a_machine_without_control_groups_or_proc_has_no_limits(tmp_path):
    assert machine.cgroup_cores(tmp_path) is None
    assert machine.cgroup_memory(tmp_path) is None
    assert machine.cpu_model(tmp_path)
    assert machine.file_system(tmp_path, tmp_path) == {"type": None, "device": None, "mount": None}


def test_a_file_system_is_that_of_the_innermost_and_last_mount(tmp_path):
    proc = tree(
        tmp_path,
        {
            "proc/self/mountinfo": (
                "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
                "28 27 0:40 / {}/data rw - ext4 /dev/hidden rw\n"
                "29 27 0:41 / {}/data rw shared:1 master:2 - nfs4 server:/images rw,vers=4.2\n"
                "30 27 0:42 / {}/my\\040disk rw - xfs /dev/sdb1 rw\n"
            )
        },
    )
    data = machine.file_system(tmp_path / "data" / "train", proc)

    assert data == {"type": "nfs4", "device": "server:/images", "mount": str(tmp_path / "data")}
    assert machine.file_system(tmp_path / "my disk", proc)["type"] == "xfs"
    assert machine.file_system(tmp_path / "database", proc)["device"] == "/dev/vda"


def test_this_checkout_lies_on_some_file_system(checkout):
    found = machine.file_system(checkout)

    assert found["type"]
    assert Path(found["mount"]).is_dir()


def test_a_package_that_is_absent_has_no_version():
    assert machine.version("no-such-package-of-ours") is None
    assert machine.version("numpy")


def test_without_a_driver_there_are_no_gpus_and_with_one_all_is_told_or_none(monkeypatch):
    found = machine.gpus()

    assert all(
        gpu.keys()
        == {
            *("name", "memory_gb", "driver", "cuda", "jpeg_engines", "clocks", "power_cap_w"),
            *("mig", "ecc"),
        }
        for gpu in found
    )
    assert (machine.gpu_memory_mb(0) is None) == (not found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu_memory_mb(0) is None
