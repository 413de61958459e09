"""Two real processes train on one shard: chunks are cut between them, messages name all rows."""

import re
import shutil
import subprocess
import sys

import numpy as np

from fastssl import data, order
from pipelines.readers import tar
from tests.small_run import SMALL

BATCH = 8


def test_two_processes_share_the_chunks_of_a_shard_and_a_broken_loss_names_the_rows_of_both(
    demo_images, recipe, environ, checkout, tmp_path
):
    for file in sorted((demo_images / "train").glob("*/000[0-9]*.jpg"))[:72]:
        target = tmp_path / "images" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    store = tmp_path / "store"
    packing = ["pack", str(tmp_path / "images"), str(store), "--form", "raw"]
    assert data.main([*packing, "--short-side", "full", "--workers", "1"]) == 0
    by_chunks = ["data.use=pipelines.readers.tar", f"data.root={store}", "data.shuffle=chunks"]
    by_chunks += ["data.chunk_mb=1", "data.window=1"]
    broken = ["optim.lr=1.0e+30", "optim.final_lr=0", "probe.every_epochs=0"]
    here = [f"train.out={tmp_path}/run", f"train.batch={BATCH}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "fastssl/train.py", recipe, *SMALL, *by_chunks, *broken, *here],
        cwd=checkout,
        env=environ,
        capture_output=True,
        text=True,
    )
    told = re.search(r"the loss is nan at step (\d+):.*The batch: rows ([\d, ]+) of", done.stderr)
    options = tar.Options(root=str(store), shuffle="chunks", chunk_mb=1, window=1)
    samples = tar.list_samples(options, cache=None, say=print)
    assert samples.chunks is not None
    assert told, done.stderr
    step = int(told[1]) - 1
    steps = order.steps_per_epoch(len(samples), 2, BATCH // 2)
    plans = [
        order.by_chunks(samples.chunks, 0, step // steps, rank, 2, BATCH // 2, 1) for rank in (0, 1)
    ]
    expected = np.concatenate([plan[step % steps] for plan in plans])

    assert len(samples.shards) == 1
    assert len(samples.chunks) > 1
    assert [int(row) for row in told[2].split(", ")] == expected.tolist()
