import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.scale_points import listing
from fastssl import config, doctor, doctor_recipe, machine
from fastssl.doctor import Line

GPU = {
    "name": "NVIDIA A100",
    "memory_gb": 40.0,
    "driver": "550.54.15",
    "cuda": "12.4",
    "jpeg_engines": 1,
    "clocks": {"sm": 1410, "sm_most": 1410, "memory": 1215},
    "power_cap_w": 400.0,
    "mig": False,
    "ecc": True,
}


def facts(**changed) -> dict:
    """A sound machine without a GPU, and what differs from it."""
    sound = {
        "cpu": "a CPU",
        "cores": 8,
        "cores_allowed": 8,
        "cgroup_cpu": None,
        "memory_gb": 32.0,
        "cgroup_memory_gb": None,
        "shm_gb": 16.0,
        "shm_free_gb": 16.0,
        "versions": {"torch": "2.15.0", "nvidia-dali-cuda120": "2.4.0"},
        "gpu": [],
    }
    return sound | changed


def bad(lines) -> list[str]:
    """All lines that are not ok."""
    return [str(line) for line in lines if line.state != "ok"]


def run(*arguments: str, environ: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastssl.doctor", *arguments],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory, environ, checkout, demo_images) -> subprocess.CompletedProcess:
    """The whole doctor on a recipe of the checkout, with the built-in images."""
    out = tmp_path_factory.mktemp("run")
    recipe = "recipes/rotation.yaml"
    return run(recipe, f"train.out={out}", environ=environ, folder=checkout)


def test_a_sound_machine_and_recipe_get_a_line_for_each_thing_looked_at(report):
    *lines, _, last = report.stdout.splitlines()
    about = [line[6:].partition(":")[0] for line in lines]
    failed = [line for line in lines if not line.startswith(("ok    ", "note  "))]
    expected = doctor.check_cores(machine.facts())  # of this machine: one core is too few

    assert failed == [str(line) for line in expected if line.state == "FAIL"], report.stderr
    assert report.returncode == bool(failed)
    assert last == (f"{len(failed)} of {len(lines)} lines failed" if failed else "nothing failed")
    wanted = ["fastssl", "system", "versions", "GPU", "cores", "memory", "shared memory", "torch"]
    wanted += ["torchvision", "DALI", "recipe", "run folder", "images", "disk", "first batch"]
    assert [name for name in [*wanted, "step", "limit"] if name not in about] == []


def test_a_report_can_be_pasted_as_it_is(report):
    assert "\x1b" not in report.stdout
    assert report.stdout.isascii()
    assert os.path.expanduser("~") + "/" not in report.stdout


def test_a_report_names_the_first_batch_and_the_limit(report):
    text = report.stdout

    assert "ms for 64 images on" in text
    assert "python -m benchmarks stages" in text
    assert "images/s" in next(line for line in text.splitlines() if "disk:" in line)


def test_mistakes_in_a_recipe_are_one_failed_line_each(checkout, monkeypatch):
    path = str(checkout / "recipes" / "rotation.yaml")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of the tests' own process
    asked = {"path": path, "overrides": ["optim.lr=-1.0", "train.bacth=3"]}
    lines = list(doctor_recipe.check_recipe(asked))

    assert [(line.state, line.what) for line in lines] == [("FAIL", "recipe")] * 2
    assert any("lr (-1.0) must be above 0" in line.text for line in lines)
    assert any("did you mean 'batch'?" in line.text for line in lines)


def test_a_failed_line_makes_the_exit_code_1(checkout, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda *_: iter([Line("FAIL", "GPU", "gone: find it")]))

    assert doctor.main([]) == 1
    assert capsys.readouterr().out == "FAIL  GPU: gone: find it\n\n1 of 1 lines failed\n"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [(["--fix"], "unknown option --fix"), (["train.batch=3"], "comes before a recipe")],
)
def test_misuse_is_told_in_a_line_with_the_usage(arguments, found, capsys):
    assert doctor.main(arguments) == 2
    captured = capsys.readouterr()
    assert found in captured.err
    assert doctor.USAGE in captured.err
    assert captured.out == ""


def test_a_run_folder_that_training_would_refuse_fails(tmp_path, checkout):
    (tmp_path / "somebody-s.txt").touch()
    recipe = config.load(checkout / "recipes" / "rotation.yaml", [f"train.out={tmp_path}"])
    (line,) = doctor_recipe._run_folder(recipe)

    assert (line.state, line.what) == ("FAIL", "run folder")
    assert "train.out=" in line.text


def test_images_in_an_object_store_are_no_disk_to_measure():
    samples = SimpleNamespace(root="s3://b/p", usable=np.arange(3), path="s3://b/p/{}".format)
    (line,) = doctor_recipe._disk(samples, 1, {})

    assert (line.state, line.what) == ("note", "disk")
    assert line.text == "not measured: s3://b/p: images are in an object store"


def test_chunks_are_read_as_training_reads_them():
    samples = SimpleNamespace(usable=np.arange(100, 112), chunks=np.array([4, 8, 12]), window=1)
    rows = doctor_recipe._rows(samples, 0, 4)

    assert sorted(sorted(rows(step)) for step in range(3)) == [
        *([100, 101, 102, 103], [104, 105, 106, 107], [108, 109, 110, 111])
    ]


def test_help_is_no_misuse(capsys):
    assert doctor.main(["--help"]) == 0
    assert doctor.USAGE in capsys.readouterr().out


def test_a_sound_machine_has_nothing_to_remedy():
    sound = facts(gpu=[GPU])
    for check in (doctor.check_packages, doctor.check_gpus, doctor.check_cores):
        assert bad(check(sound)) == []
    assert bad(doctor.check_memory(sound)) == []
    assert bad(doctor.check_shared_memory(sound)) == []
    assert bad(doctor.check_visible(sound, "12.6", 1, "", None)) == []


@pytest.mark.parametrize(
    ("versions", "gpu", "wrong"),
    [
        (
            {"nvidia-dali-cuda120": "2.4.0", "nvidia-dali-cuda130": "2.4.0"},
            [],
            "pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130",
        ),
        ({"nvidia-dali-cuda120": "2.1.1"}, [], "pip install -U 'nvidia-dali-cuda120>=2.2'"),
        ({"nvidia-dali-cuda120": "2.4.0"}, [GPU | {"driver": "525.53"}], "older than 525.60"),
        ({"nvidia-dali-cuda130": "2.4.0"}, [GPU | {"driver": "575.10"}], "older than 580"),
    ],
)
def test_packages_that_do_not_go_together_fail_with_the_remedy(versions, gpu, wrong):
    (line,) = bad(doctor.check_packages(facts(versions=versions, gpu=gpu)))

    assert line.startswith("FAIL")
    assert wrong in line


@pytest.mark.parametrize(
    ("cuda", "count", "why", "visible", "state", "wrong"),
    [
        (None, 0, "", None, "FAIL", "built without CUDA"),
        ("13.2", 0, "driver too old", None, "FAIL", "up to 12.4 and torch is built for 13.2"),
        ("12.6", 0, "", "3", "FAIL", "check CUDA_VISIBLE_DEVICES"),
        ("12.6", 0, "", "", "note", "hidden by CUDA_VISIBLE_DEVICES=''"),
        ("12.6", 1, "", None, "note", "torch sees 1 of 2"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told_with_the_reason(
    cuda, count, why, visible, state, wrong
):
    (line,) = bad(doctor.check_visible(facts(gpu=[GPU, GPU]), cuda, count, why, visible))

    assert line.startswith(state)
    assert wrong in line


def test_engines_and_slices_of_a_gpu_are_told():
    lines = bad(doctor.check_gpus(facts(gpu=[GPU | {"jpeg_engines": None, "mig": True}])))

    assert "not told by this driver" in lines[0]
    assert "MIG" in lines[1]


@pytest.mark.parametrize(
    ("changed", "state", "wrong"),
    [
        ({"cores_allowed": 1}, "FAIL", "1 of 8 allowed"),
        ({"cgroup_cpu": 2.5}, "note", "a quota of 2.5"),
        ({"cgroup_cpu": 3.0, "gpu": [GPU]}, "note", "3 for each GPU"),
    ],
)
def test_too_few_cores_are_told(changed, state, wrong):
    line = bad(doctor.check_cores(facts(**changed)))[-1]

    assert line.startswith(state)
    assert wrong in line


def test_small_memories_are_told():
    little = facts(cgroup_memory_gb=2.0, shm_gb=0.06, shm_free_gb=0.06)

    assert "2.0 allowed" in bad(doctor.check_memory(little))[0]
    assert bad(doctor.check_shared_memory(little))[0].startswith("note")
    two = little | {"gpu": [GPU, GPU]}
    assert bad(doctor.check_shared_memory(two))[0].startswith("FAIL")
    assert "--shm-size" in bad(doctor.check_shared_memory(two))[0]


def test_a_check_that_breaks_is_a_line_that_names_the_exception():
    wheel = {"nvidia-dali-cuda120": "2.4.0"}
    *_, line = doctor.guarded("packages", doctor.check_packages, {"versions": wheel})

    assert line.state == "FAIL"
    assert "KeyError: 'gpu'" in line.text


@pytest.fixture
def in_child(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def lines(check, silence=30.0):
        return list(doctor.in_child("spy", "spy_checks", check, {"word": "given"}, silence))

    return lines


def test_a_child_that_crashes_is_a_line_that_names_the_signal(in_child, capsys):
    first, last = in_child("check_killed")

    assert (first.state, first.what) == ("ok", "before")
    assert last.state == "FAIL"
    assert "SIGSEGV after 1 lines" in last.text
    assert capsys.readouterr().err == "waiting for a signal\n"


def test_a_child_that_hangs_is_ended(in_child):
    (line,) = in_child("check_hanging", silence=0.5)

    assert line.state == "FAIL"
    assert "silent for 0.5 s" in line.text


def test_a_check_that_breaks_in_a_child_is_a_line(in_child):
    first, last = in_child("check_broken")

    assert first.text == "given"
    assert "ZeroDivisionError: of our own" in last.text


def test_a_child_that_can_t_start_is_a_line(in_child):
    (line,) = in_child("no_such_check")

    assert line.state == "FAIL"
    assert "ImportError" in line.text


def test_lines_hide_the_home_folder_colours_and_passwords(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    text = doctor.fit_to_paste("\x1b[31m/home/ada/data\x1b[0m\n s3://ada:key@host/x /home/adam")

    assert text == "~/data s3://***@host/x /home/adam"


def test_versions_compare_by_their_numbers():
    assert doctor.numbers("525.60.13") >= (525, 60)
    assert doctor.numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor.numbers("2.10") > doctor.numbers("2.9.1")
    assert doctor.numbers(None) == ()


@pytest.mark.parametrize(
    ("rates", "device", "state", "found"),
    [
        ({"loader": 900.0, "step": 300.0, "disk": 5000.0}, "cuda", "ok", "the step: loader 900"),
        ({"loader": 200.0, "step": 300.0, "disk": 5000.0}, "cuda", "note", "the loader: "),
        ({"loader": 900.0, "step": 300.0, "disk": 50.0}, "cuda", "note", "the disk, while"),
        ({"loader": 300.0, "step": 300.0}, "cpu", "ok", "by turns on the same cores about 150"),
    ],
)
def test_the_slowest_of_disk_loader_and_step_is_the_limit(rates, device, state, found):
    line = doctor_recipe.limit(rates, device)

    assert (line.state, line.what) == (state, "limit")
    assert found in line.text
    assert "python -m benchmarks stages" in line.text


def test_the_disk_is_read_in_pieces_where_a_file_holds_many_images(tmp_path):
    (tmp_path / "shard").write_bytes(bytes(3 * doctor_recipe.PIECE + 5))
    store = replace(listing(10), root=str(tmp_path))  # its names are not those of files
    pieces, image_bytes = doctor_recipe._pieces(store)
    (line,) = doctor_recipe._disk(store, 1, {})

    assert sorted(offset for _, offset, _ in pieces) == [k * doctor_recipe.PIECE for k in range(3)]
    assert image_bytes == (3 * doctor_recipe.PIECE + 5) / 10
    assert line.state == "ok"
    assert "3 MB read" in line.text
