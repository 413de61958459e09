"""Many machines: two that are two torchrun agents on loopback, and the files of recipes/cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from fastssl import checkpoint, journal
from tests import agents

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "cluster"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
STEPS = 5  # an epoch of 40 images

# ---- Two machines ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def same_image_40_times(tmp_path_factory, demo_images) -> Path:
    """train/ and val/ in 5 classes: without random augmentation all pixels would be alike."""
    root = tmp_path_factory.mktemp("data")
    image = sorted((demo_images / "train").glob("*/*.jpg"))[0]
    for split, each in (("train", 8), ("val", 2)):
        for number in range(5):
            folder = root / split / f"class-{number}"
            folder.mkdir(parents=True)
            for copy in range(each):
                shutil.copy(image, folder / f"{copy}.jpg")
    return root / "train"


def run_on_two_machines(
    folder: Path, recipe: Path, root: str, checkout: Path, environ: dict[str, str]
) -> list[tuple[int, str]]:
    """Exit code and output of both; each has a cache and a working directory of its own."""
    (folder / "spied").mkdir()
    overrides = [
        f"data.root={root}",
        f"train.out={folder / 'run'}",
        "pipeline.image_size=32",
        "pipeline.patches_crop=48",
        "pipeline.patch=12",
        "evaluation.resize=36",
        "evaluation.crop=32",
        "objective.use=tests.spy_cluster",
        "objective.negatives=16",
        "train.batch=8",
        "train.epochs=1",
        "train.log_steps=1",
        "probe.batch=16",
    ]

    def start(number: int, port: int) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(number)]
        meeting = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        script = ["--nproc_per_node", "1", checkout / "fastssl" / "train.py", recipe, *overrides]
        here = {"FASTSSL_CACHE": str(folder / f"cache-{number}")}
        (folder / f"machine-{number}").mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, *torchrun, *meeting, *script],
            env=environ | here | {"SPY_FOLDER": str(folder / "spied")},
            cwd=folder / f"machine-{number}",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return agents.two(start)


@pytest.fixture(scope="module")
def two_machines(same_image_40_times, recipe, checkout, environ, tmp_path_factory) -> Path:
    """The folder of a run on two machines: run/, spied/, cache-0/ and cache-1/."""
    folder = tmp_path_factory.mktemp("two-machines")
    ended = run_on_two_machines(folder, recipe, str(same_image_40_times), checkout, environ)
    assert [code for code, _ in ended] == [0, 0], ended
    return folder


def test_machines_with_other_files_are_refused(
    same_image_40_times, recipe, checkout, environ, tmp_path
):
    for number in (0, 1):  # images/train is another folder on each
        shutil.copytree(same_image_40_times, tmp_path / f"machine-{number}" / "images" / "train")
    (tmp_path / "machine-1" / "images" / "train" / "class-4" / "7.jpg").rename(
        tmp_path / "machine-1" / "images" / "train" / "class-4" / "8.jpg"
    )
    ended = run_on_two_machines(tmp_path, recipe, "images/train", checkout, environ)

    assert [code for code, _ in ended] == [1, 1]  # torchrun's
    assert "(rank 1) is not what rank 0 sees" in ended[1][1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def spied(folder: Path, name: str) -> tuple[list[dict], list[dict]]:
    """What the global ranks 0 and 1 wrote down, a line a step."""
    files = [folder / "spied" / f"{name}-{rank}.jsonl" for rank in (0, 1)]
    one, two = ([json.loads(x) for x in file.read_text().splitlines()] for file in files)
    assert len(one) == len(two) == STEPS
    return one, two


def test_both_machines_call_their_process_0_and_each_keeps_its_own_listing(two_machines):
    one, two = spied(two_machines, "pixels")
    caches = [two_machines / f"cache-{number}" for number in (0, 1)]
    listings = [{file.name for file in cache.rglob("*") if file.is_file()} for cache in caches]

    assert {line["local_rank"] for line in one + two} == {0}  # else this shows nothing
    assert listings[0] == listings[1]
    assert listings[0] - {".lock"}


def test_two_machines_share_the_images_each_once_an_epoch(two_machines):
    one, two = spied(two_machines, "rank")
    seen = [row for line in one + two for row in line["images"]]

    assert sorted(seen) == list(range(40))


def test_two_machines_hold_the_same_bank_and_weights_after_each_step(two_machines):
    one, two = spied(two_machines, "rank")

    assert [line["bank"] for line in one] == [line["bank"] for line in two]
    assert [line["weights"] for line in one] == [line["weights"] for line in two]
    assert len({line["weights"] for line in one}) == STEPS  # they do change


def test_two_machines_crop_the_same_image_differently(two_machines):
    one, two = spied(two_machines, "pixels")
    ours, others = ({hash for line in lines for hash in line["pixels"]} for lines in (one, two))

    assert not ours & others


def test_two_machines_take_random_numbers_of_their_own(two_machines):
    (saved,) = (two_machines / "run" / "checkpoints").iterdir()
    streams = [here["rng"]["torch"] for here in checkpoint.load(saved)["ranks"]]

    assert len(streams) == 2
    assert not torch.equal(*streams)


def test_two_machines_write_the_metrics_once(two_machines):
    lines = list(journal.read(two_machines / "run"))
    training = [line["step"] for line in lines if "probe" not in line]
    probes = [line["step"] for line in lines if "probe" in line]

    assert training == list(range(1, STEPS + 1))
    assert probes == [0, STEPS]
    assert len(json.loads((two_machines / "run" / "environment.json").read_text())) == 1


# ---- Accelerate's files ------------------------------------------------------------------------


def test_the_cluster_folder_has_a_file_for_one_machine_and_one_for_two():
    assert [path.stem for path in CONFIGS] == ["one_machine_8_gpus", "two_machines_8_gpus"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_and_leaves_precision_to_the_recipe(path):
    read = load_config_from_file(str(path))

    assert isinstance(read, ClusterConfig)
    assert read.distributed_type == DistributedType.MULTI_GPU
    assert read.num_processes == 8 * read.num_machines
    assert (read.num_machines > 1) == (read.main_process_ip is not None)
    assert read.mixed_precision == "no"
    assert read.dynamo_config == {}


# ---- Slurm's script ----------------------------------------------------------------------------

# In place of Slurm's commands, which are nowhere to be had: srun ends as MEANWHILE says, or at a
# TERM with torchrun's 1; the others write down what they were asked.
STAND_INS = {
    "srun": """
        printf '%s\\n' "$@" > asked/srun
        echo "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" > asked/store
        case $MEANWHILE in done) exit 0 ;; failed) exit 1 ;; esac
        trap 'exit 1' TERM
        echo $$ > asked/pid
        while :; do sleep 0.05; done""",
    "scancel": 'echo "$@" > asked/scancel; kill -TERM "$(cat asked/pid)"',
    "scontrol": """
        case $1 in
            show) printf 'first\\nsecond\\n' ;;
            requeue) echo "$2" > asked/requeue ;;
        esac""",
}


@pytest.fixture
def sbatch(tmp_path, environ) -> Callable[[str], subprocess.Popen]:
    """Runs slurm.sh as sbatch would, in a folder that passes for the checkout."""
    (tmp_path / "fastssl").mkdir()
    (tmp_path / "fastssl" / "train.py").touch()
    (tmp_path / "asked").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }

    def start(meanwhile: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", FOLDER / "slurm.sh", *arguments],
            env=environ | slurm | {"MEANWHILE": meanwhile},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)


def test_the_slurm_script_says_how_it_is_called(sbatch):
    job = sbatch("done")

    assert "sbatch recipes/cluster/slurm.sh RECIPE" in job.communicate()[0]
    assert job.returncode == 2


@pytest.mark.parametrize(("meanwhile", "code"), [("done", 0), ("failed", 1)])
def test_a_job_that_is_done_or_failed_is_not_queued_again(sbatch, tmp_path, meanwhile, code):
    job = sbatch(meanwhile, "some.yaml", "train.out=a folder")
    job.communicate()
    words = (tmp_path / "asked" / "srun").read_text().splitlines()

    assert job.returncode == code
    assert not (tmp_path / "asked" / "requeue").exists()
    assert words[-3:] == ["fastssl/train.py", "some.yaml", "train.out=a folder"]
    assert "--rdzv_endpoint=first:24711" in words
    assert "--max_restarts=2" in words
    assert (tmp_path / "asked" / "store").read_text() == "1\n"  # else no restart succeeds


def test_a_job_out_of_time_asks_the_steps_to_stop_and_is_queued_again(sbatch, tmp_path):
    job = sbatch("training", "some.yaml")
    deadline = time.monotonic() + 60
    while not (tmp_path / "asked" / "pid").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@300 has it
    said = job.communicate()[0]

    assert (tmp_path / "asked" / "scancel").read_text() == "--signal=TERM 4711\n"
    assert (tmp_path / "asked" / "requeue").read_text() == "4711\n"
    assert "queued again" in said
