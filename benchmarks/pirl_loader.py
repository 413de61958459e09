"""PIRL's loader at the recipe's real sizes, beside decoding alone and beside torch's DataLoader.

    python -m benchmarks.pirl_loader FOLDER [--out FILE] [section.key=value ...]

Four contenders on the same files, by turns in one process (the machine's mood hits all alike):
  decode    DALI, reading and decoding only: no task can be faster
  graph     pipelines/pirl_jigsaw.py run bare, without our loader
  fastssl   the same through fastssl.loader: what training gets
  pil       torch DataLoader, PIL and torchvision transforms as users write them: the same crops,
            flips, colours, patches and order, uint8 out, one worker a core
Reported: images/s of each turn, median and spread; ratios within a round, median and spread.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia import dali
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import __version__ as torchvision_version
from torchvision.transforms import v2

from fastssl import config, order
from fastssl.loader import Loader, threads_per_process
from pipelines import ops, pirl_jigsaw

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pirl_jigsaw.yaml"


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipe = config.load(str(RECIPE), [f"data.root={arguments.folder}", *arguments.overrides])
    result = measure(recipe, arguments.batch, arguments.rounds, arguments.seconds)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(recipe: config.Recipe, batch: int, rounds: int, seconds: float) -> dict:
    """Runs the contenders by turns; returns the result with its manifest."""
    options = recipe.pipeline.options
    assert isinstance(options, pirl_jigsaw.Options)
    reader = recipe.data.module
    samples = reader.list_samples(recipe.data.options, cache=None, say=print)
    threads = threads_per_process(1)
    per_epoch = order.steps_per_epoch(len(samples.usable), 1, batch)

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, per_epoch)
        return samples.usable[order.shuffled(len(samples.usable), 0, epoch, 0, 1, batch)[step]]

    def pipeline(graph: Callable) -> Pipeline:
        made = Pipeline(batch_size=batch, num_threads=threads, device_id=None, seed=0)  # pyright: ignore[reportArgumentType]  None: no GPU
        with made:
            encoded, index = reader.source(samples, rows)
            made.set_outputs(*graph(encoded, index))
        made.build()
        return made

    decode = pipeline(lambda encoded, index: (ops.decode(encoded, "cpu"), index))
    bare = pipeline(lambda e, i: tuple(pirl_jigsaw.graph(e, i, options, "cpu").values()))
    loader = Loader(
        reader,
        samples,
        recipe.pipeline.module,
        options,
        rows,
        batch=batch,
        seed=0,
        device=torch.device("cpu"),
        threads=threads,
    )
    plain = _forever(
        DataLoader(
            PilPirl([samples.path(int(row)) for row in samples.usable], options),
            batch_size=batch,
            shuffle=True,
            num_workers=threads,
            drop_last=True,
            persistent_workers=True,
            worker_init_fn=_seed_worker,
        )
    )
    contenders: dict[str, Callable[[], object]] = {
        "decode": decode.run,
        "graph": bare.run,
        "fastssl": lambda: next(loader),
        "pil": lambda: next(plain),
    }
    for run in contenders.values():  # first batches: start-up, page cache, prefetch queues
        for _ in range(3):
            run()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            rate, cpu_ms = _turn(run, batch, seconds, skip=5)
            rates[name].append(rate)
            cpu[name].append(cpu_ms)
    return {
        "benchmark": "pirl_loader",
        "unit": "images/s",
        "rates": rates,
        "cpu_ms_per_image": {name: cpu[name] for name in ("decode", "graph", "fastssl")},
        "options": recipe.values["pipeline"],
        "batch": batch,
        "images": len(samples.usable),
        "mean_pixels": float((samples.height.astype(float) * samples.width).mean()),
        "mean_bytes": float(
            np.mean([os.path.getsize(samples.path(int(r))) for r in samples.usable])
        ),
        "threads": threads,
        "manifest": manifest(),
    }


def _turn(run: Callable[[], object], batch: int, seconds: float, skip: int) -> tuple[float, float]:
    """Images/s and this process's CPU milliseconds an image; what was made ahead is not counted."""
    for _ in range(skip):
        run()
    images, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        run()
        images += batch
    return (
        images / (time.perf_counter() - began),
        1000 * (time.process_time() - cpu) / images,
    )


def table(result: dict) -> str:
    """Median and range of each contender, and its ratio to `pil` and `decode` round by round."""
    rates = result["rates"]
    lines = ["| contender | images/s, median (least - most) | to pil | to decode | to graph |"]
    lines.append("|---|---|---|---|---|")
    for name, values in rates.items():
        ratios = []
        for other in ("pil", "decode", "graph"):
            each = sorted(a / b for a, b in zip(values, rates[other], strict=True))
            ratios.append(f"{statistics.median(each):.2f} ({each[0]:.2f} - {each[-1]:.2f})")
        middle = f"{statistics.median(values):.0f} ({min(values):.0f} - {max(values):.0f})"
        lines.append(f"| {name} | {middle} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def manifest() -> dict:
    """The machine, the versions, the command and the commit."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision_version,
        "dali": dali.__version__,
        "pillow": Image.__version__,
        "command": " ".join(sys.orig_argv),
        "commit": commit.stdout.strip() or None,
    }


class PilPirl(Dataset):
    """The task as a user of torchvision would write it."""

    def __init__(self, paths: list[str], options: pirl_jigsaw.Options) -> None:
        """The same sizes, areas and strengths as the graph's."""
        self._paths, self._options = paths, options
        o = options
        colors = [
            v2.ColorJitter(o.brightness, o.contrast, o.saturation, o.hue),
            v2.RandomGrayscale(o.grayscale),
            v2.PILToTensor(),
        ]
        self._image = v2.Compose(
            [
                v2.RandomResizedCrop(o.image_size, o.image_area, antialias=True),
                v2.RandomHorizontalFlip(o.flip),
                *colors,
            ]
        )
        self._crop = v2.Compose(
            [
                v2.RandomResizedCrop(o.patches_crop, o.patches_area, antialias=True),
                v2.RandomHorizontalFlip(o.flip),
            ]
        )
        self._patch = v2.Compose(colors)

    def __len__(self) -> int:
        """Images."""
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Image [3, S, S], patches [9, 3, p, p], permutation [9], row."""
        with Image.open(self._paths[row]) as file:
            image = file.convert("RGB")
        crop, o = self._crop(image), self._options
        side = o.patches_crop // o.grid
        cells = list(range(o.grid**2))
        random.shuffle(cells)
        patches = []
        for cell in cells:
            top = (cell // o.grid) * side + random.randint(0, side - o.patch)
            left = (cell % o.grid) * side + random.randint(0, side - o.patch)
            patches.append(self._patch(crop.crop((left, top, left + o.patch, top + o.patch))))
        return self._image(image), torch.stack(patches), torch.tensor(cells), row


def _seed_worker(_: int) -> None:
    random.seed(torch.initial_seed())


def _forever(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


if __name__ == "__main__":
    main()
