"""A memory bank that is shared out over processes is the whole one: real processes, real files."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from fastssl import checkpoint
from fastssl import train as train_command
from fastssl.memory import BLOCK, Memory
from tests import test_pirl

IMAGES = 13  # which two processes do not share without a rest
STEPS = 2
SHARED_OUT = {"shard_bank_gb": 0.0}
# objective, batches a step
RUNS = {
    "nce": ({}, 1),
    "npid": ({"patch_weight": 0.0, "negatives": 4}, 2),
    "memory": ({"normalizer": "memory"}, 1),
    "rotation": ({"transform": "rotation", "loss": "infonce", "patch_weight": 1.0}, 2),
    "constant": ({"loss": "nce_constant_z"}, 1),
    "whole": ({"negatives": 32000}, 2),
    "bfloat16": ({"bank_dtype": "bfloat16"}, 1),
    "image": ({"negatives_for": "image"}, 2),
    "image constant": ({"negatives_for": "image", "loss": "nce_constant_z"}, 1),
    "image bfloat16": ({"negatives_for": "image", "bank_dtype": "bfloat16"}, 1),
}
# Drawn for each image by each process, or rounded from float32: no joined batch gives the same.
ALONE = ["nce", "npid", "memory", "rotation", "constant", "whole"]


def build(name, **more):
    return test_pirl.build(images=IMAGES, **RUNS[name][0], **more)


def batches(name, world, steps=range(STEPS)):
    """What all processes see, of each step its batches; images occur twice, also in one batch."""
    make = test_pirl.turned_batch if name == "rotation" else test_pirl.batch
    for step in steps:
        numbers = torch.Generator().manual_seed(step)
        parts = []
        for part in range(RUNS[name][1]):
            index = torch.randint(IMAGES, (2 * world,), generator=numbers).tolist()
            index[1] = index[0]
            parts.append(make(index=index, seed=10 * step + part, dtype=torch.float64))
        yield parts


def train(objective, model, stream, part, dtype=torch.float32):
    """Losses, the gradients of the last step, and the objective's state."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for parts in stream:
        optimizer.zero_grad()
        for inputs in parts:
            mine = {name: each[part] for name, each in inputs.items()}
            cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in mine.items()}
            value, _ = model(**cast)
            (value / len(parts)).backward()
            losses.append(value.detach())
        optimizer.step()
        objective.finish_step()
    gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    return torch.stack(losses), gradients, dict(objective.state_dict())


def parallel(objective):
    return DistributedDataParallel(objective, broadcast_buffers=False)


def load(folder):
    path = checkpoint.latest(folder)
    assert path is not None
    return checkpoint.load(path)["objective"]


def process(rank, folder):
    """What one of two processes sees; results into a file for each."""
    world = 2
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    part = slice(2 * rank, 2 * rank + 2)
    results = {}
    for name in RUNS:
        whole, shared = build(name), build(name, **SHARED_OUT)
        assert whole.memory.shards == 1
        assert shared.memory.shards == world
        results[name] = [
            train(objective, parallel(objective), batches(name, world), part)
            for objective in (whole, shared)
        ]
        if name in ALONE:
            double = build(name, **SHARED_OUT).double()
            results[f"{name} double"] = train(
                double, parallel(double), batches(name, world), part, torch.float64
            )

    unbroken = build("nce", **SHARED_OUT).double()
    _, _, state = train(unbroken, parallel(unbroken), batches("nce", world), part, torch.float64)
    if rank == 0:
        checkpoint.save(Path(folder), STEPS, {"objective": state}, keep=1)
    dist.barrier()
    restored = build("nce", **SHARED_OUT).double()
    saved = load(Path(folder))
    restored.load_state_dict(saved)
    own = saved["memory.rows"][restored.memory.first :][: len(restored.memory.rows)]
    assert torch.equal(restored.memory.rows, own)
    more = range(STEPS, STEPS + 2)
    results["on"] = [
        train(each, parallel(each), batches("nce", world, more), part, torch.float64)
        for each in (unbroken, restored)
    ]

    # the first process holds none of one row
    single = Memory(1, 4, momentum=0.5, seed=0, shard_gb=0)
    single.see(torch.tensor([0]), torch.eye(4)[[rank]])
    single.finish_step()
    read = single.read(torch.tensor([[0, 0]]))
    results["single"] = read, single.state_dict()["rows"], len(single.rows)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder with what they saved, and the results of each."""
    folder = tmp_path_factory.mktemp("two")
    start_processes(process, (str(folder),), nprocs=2, start_method="spawn")
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_shared_out_or_whole_losses_gradients_and_rows_are_the_same_to_the_bit(name, of_two):
    _, ranks = of_two
    for rank, results in enumerate(ranks):
        (loss, gradients, state), (loss_s, gradients_s, state_s) = results[name]
        rows, rows_s = state["memory.rows"], state_s["memory.rows"]
        others = state.keys() - {"memory.rows"}

        assert torch.equal(loss, loss_s)
        assert loss.isfinite().all()
        assert len(set(loss.tolist())) == len(loss)
        assert all(map(torch.equal, gradients, gradients_s))
        assert state.keys() == state_s.keys()
        assert all(torch.equal(state[key], state_s[key]) for key in others)
        assert rows_s.dtype == rows.dtype
        assert torch.equal(rows_s, rows) if rank == 0 else rows_s.shape == (0, 5)


@pytest.mark.parametrize("name", ALONE)
def test_shared_out_it_learns_as_one_process_with_the_joined_batch(name, of_two):
    _, ranks = of_two
    alone = build(name).double()
    stream = batches(name, len(ranks))
    loss, gradients, state = train(alone, alone, stream, slice(None), torch.float64)
    several = [results[f"{name} double"] for results in ranks]

    torch.testing.assert_close(sum(each[0] for each in several) / len(ranks), loss)
    for other in several:
        torch.testing.assert_close(other[1], gradients)
    for key, value in state.items():
        torch.testing.assert_close(several[0][2][key], value)


def test_bfloat16_stays_close_to_float32(of_two):
    _, ranks = of_two
    whole, half = ranks[0]["nce"][1], ranks[0]["bfloat16"][1]

    assert half[2]["memory.rows"].dtype == torch.bfloat16
    torch.testing.assert_close(half[0], whole[0], rtol=5e-3, atol=0)
    assert not torch.equal(half[0], whole[0])
    rows = half[2]["memory.rows"].float()
    torch.testing.assert_close(rows, whole[2]["memory.rows"], rtol=0, atol=0.02)


def test_restored_from_two_processes_it_goes_on_as_the_unbroken_one(of_two):
    _, ranks = of_two
    for results in ranks:
        unbroken, restored = results["on"]

        assert torch.equal(unbroken[0], restored[0])
        assert all(map(torch.equal, unbroken[1], restored[1]))
        assert torch.equal(unbroken[2]["memory.rows"], restored[2]["memory.rows"])


def test_one_process_goes_on_with_the_whole_of_what_two_have_saved(of_two):
    folder, ranks = of_two
    alone = build("nce", **SHARED_OUT).double()
    alone.load_state_dict(load(folder))
    stream = batches("nce", 2, range(STEPS, STEPS + 2))
    loss, _, state = train(alone, alone, stream, slice(None), torch.float64)
    one, two = (results["on"][1] for results in ranks)

    torch.testing.assert_close((one[0] + two[0]) / 2, loss)
    torch.testing.assert_close(one[2]["memory.rows"], state["memory.rows"])


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_every_number_of_processes_loads_its_parts_of_what_two_have_saved(
    world, of_two, monkeypatch
):
    saved = load(of_two[0])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    parts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        objective = build("nce", **SHARED_OUT).double()
        objective.load_state_dict(saved)
        parts.append(objective.memory)

    assert torch.equal(torch.cat([part.rows for part in parts]), saved["memory.rows"])
    assert {part.steps for part in parts} == {STEPS}
    assert {len(part.rows) for part in parts} <= {IMAGES // world, IMAGES // world + 1}


def test_a_process_without_a_row_takes_part(of_two):
    _, ranks = of_two
    first = Memory(1, 4, momentum=0.5, seed=0).rows
    row = torch.nn.functional.normalize(first + torch.tensor([[0.5, 0.5, 0, 0]]), dim=1)

    assert [results["single"][2] for results in ranks] == [0, 1]
    assert torch.equal(ranks[0]["single"][1], ranks[0]["single"][0][0, :1])
    for results in ranks:
        torch.testing.assert_close(results["single"][0], row.expand(1, 2, 4))


def test_a_bank_of_another_size_is_refused(monkeypatch):
    other = Memory(12, 4, momentum=0.5, seed=0).state_dict()
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(RuntimeError, match="size mismatch for rows"):
        Memory(13, 4, momentum=0.5, seed=0, shard_gb=0).load_state_dict(other)


# -- before there is a process group, and files ----------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_are_the_whole_one_s_rows_in_order_and_no_process_makes_more(world, monkeypatch):
    images = 2 * BLOCK + 1001
    whole = Memory(images, 2, momentum=0.5, seed=4).rows
    monkeypatch.setenv("WORLD_SIZE", str(world))
    parts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(Memory(images, 2, momentum=0.5, seed=4, shard_gb=0.001))

    assert torch.equal(torch.cat([part.rows for part in parts]), whole)
    assert max(len(part.rows) for part in parts) == math.ceil(images / world)
    assert [part.first for part in parts] == [images * rank // world for rank in range(world)]


@pytest.mark.parametrize("name", ["nce", "memory", "image", "image bfloat16"])
def test_a_bank_shared_out_reads_no_value_back_from_the_device(name, monkeypatch):
    # fake tensors have shapes and no values: what would wait for a GPU raises
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    objective = build(name, **SHARED_OUT)
    inputs = test_pirl.batch()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        objective._apply(mode.from_tensor)
        fake = {key: mode.from_tensor(each) for key, each in inputs.items()}
        value, _ = objective(**fake)
        value.backward()
        objective.memory._write(fake["index"], torch.empty(4, 5))

    assert objective.memory.rows.shape == (7, 5)
    assert value.ndim == 0


def test_only_a_bank_above_the_limit_is_shared_out_and_says_what_it_takes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")

    def bank(**more):
        return Memory(1_000_000, 4, momentum=0.5, seed=0, **more)

    assert bank(shard_gb=0.016).summary() == (
        "memory bank: 1,000,000 rows of 4 in float32, 0.016 GB on each process"
    )
    assert bank(shard_gb=0.0159).summary() == (
        "memory bank: 1,000,000 rows of 4 in float32, 0.016 GB shared out over 4 processes, "
        "0.004 GB on each"
    )
    assert bank(shard_gb=0.0159, dtype=torch.bfloat16).shards == 1  # which takes half
    assert bank().shards == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert bank(shard_gb=0).shards == 1


def test_imagenet_stays_whole_by_default_and_yfcc_does_not():
    limit = test_pirl.pirl.Options().shard_bank_gb

    assert 1_281_167 * 128 * 4 / 1e9 <= limit < 13_000_000 * 128 * 2 / 1e9


def test_a_share_of_a_large_bank_is_loaded_without_the_rest(tmp_path, checkout, environ):
    saved = Memory(160_000, 128, momentum=0.5, seed=0).state_dict()  # 82 MB
    path = checkpoint.save(tmp_path, 1, {"objective": saved}, keep=1)
    # measured are the bytes that are in no file
    script = """
import os, sys
from pathlib import Path
import torch
from fastssl import checkpoint
from fastssl import train as train_command
from fastssl.memory import Memory

def own():
    # counted now; the kernel's count in status is late by up to some megabytes on many cores
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Anonymous")))

os.environ |= {"WORLD_SIZE": "4", "RANK": "2"}
memory = Memory(160_000, 128, momentum=0.5, seed=1, shard_gb=0.05)
before = own()
saved = checkpoint.load(Path(sys.argv[1]))
memory.load_state_dict(saved["objective"])
print(own() - before, torch.equal(memory.rows, saved["objective"]["rows"][80_000:120_000]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=checkout,
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )
    taken, same = done.stdout.split()

    assert same == "True"
    assert int(taken) < 20e6


def test_what_was_loaded_can_be_written_to_and_the_file_stays(tmp_path):
    rows = torch.arange(2**24, dtype=torch.float32)  # 67 MB: mapped
    path = checkpoint.save(tmp_path, 1, {"rows": rows, "few": torch.ones(3)}, keep=1)
    loaded = checkpoint.load(path)
    loaded["rows"][5] = -1
    loaded["few"][1] = -1
    again = checkpoint.load(path)

    assert again["rows"][5] == 5
    assert again["few"].tolist() == [1, 1, 1]
    assert torch.equal(again["rows"], rows)


# -- a run ----------------------------------------------------------------------------------------


def test_a_run_of_two_processes_saves_the_whole_bank_and_one_process_goes_on_from_it(
    recipe, checkout, environ, demo_images, tmp_path, capsys
):
    for folder in sorted((demo_images / "train").iterdir())[:4]:
        (tmp_path / "images" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:5]:
            shutil.copy(file, tmp_path / "images" / folder.name)
    command = [
        str(recipe),
        f"data.root={tmp_path / 'images'}",
        "pipeline.image_size=32",
        "pipeline.patches_crop=48",
        "pipeline.patch=12",
        "evaluation.resize=36",
        "evaluation.crop=32",
        "objective.negatives=8",
        "objective.shard_bank_gb=0",
        "objective.bank_dtype=bfloat16",
        "train.batch=8",  # 20 images: the last batch of an epoch is filled up
        "train.epochs=2",
        "train.checkpoint_steps=3",
        "train.log_steps=3",
        "probe.every_epochs=0",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, checkout / "fastssl" / "train.py", *command, f"train.out={tmp_path / 'two'}"],
        env=environ | {"ACCELERATE_USE_CPU": "True"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    middle, end = (
        checkpoint.load(tmp_path / "two" / "checkpoints" / f"step-0000000{step}.pt")["objective"]
        for step in (3, 6)
    )
    given = f"train.resume={tmp_path / 'two' / 'checkpoints' / 'step-00000003.pt'}"
    assert train_command.main([*command, given, f"train.out={tmp_path / 'one'}"]) == 0
    on = checkpoint.load(tmp_path / "one" / "checkpoints" / "step-00000006.pt")["objective"]
    first = Memory(20, 128, momentum=0.5, seed=0, dtype=torch.bfloat16).rows

    told = "memory bank: 20 rows of 128 in bfloat16, 5.1e-06 GB"
    assert f"{told} shared out over 2 processes, 2.6e-06 GB on each" in done.stdout
    assert f"{told} on each process" in capsys.readouterr().out
    for saved in (middle, end, on):
        rows = saved["memory.rows"]
        assert rows.dtype == torch.bfloat16
        torch.testing.assert_close(rows.float().norm(dim=1), torch.ones(20), rtol=0.01, atol=0)
        assert (rows != first).any(1).all()  # each image was seen
    assert [int(saved["memory._extra_state"]) for saved in (middle, end, on)] == [3, 6, 6]
    # the same images in the same order, otherwise cropped
    cosine = (end["memory.rows"].float() * on["memory.rows"].float()).sum(1)
    assert cosine.mean() > 0.9
    assert not torch.equal(end["memory.rows"], on["memory.rows"])
