"""A way to store images for every reader: how the same ones come to be read by each of them."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from fastssl import data
from tests import object_server

COUNTS = {"ant": 5, "bee": 4, "cat": 4}  # images of each class: a number that nothing divides
SIDE = 160  # pixels; of noise, so that the images fill several shards of a megabyte


@dataclass(frozen=True)
class Example:
    """How a folder of images, root/<class>/<name>, is given to a reader in the same order."""

    reader: str  # pipelines/readers/*
    store: Callable[[Path, Path, str], dict[str, Any]]  # from a folder, in another, or under an
    # s3:// url: the options
    # Where an image that is none is found: when the images are listed, when they are stored (and
    # left out), or when it is read.
    finds: str = "listing"


def images(to: Path, *, counts: dict[str, int] = COUNTS, side: int = SIDE) -> Path:
    """Images that differ in each pixel, and in the mean of all."""
    dice = np.random.default_rng(0)
    number = 0
    for name, count in counts.items():
        (to / name).mkdir(parents=True)
        for k in range(count):
            noise = dice.integers(0, 128, (side, side + k % 7, 3)) + number % 128
            file = to / name / f"{k:03}.jpg"
            Image.fromarray(noise.astype(np.uint8)).save(file, quality=100, subsampling=0)
            number += 1
    return to


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder(source: Path, to: Path, url: str) -> dict[str, Any]:
    return {"root": str(source)}


def lines(source: Path, to: Path, url: str) -> dict[str, Any]:
    (to / "list.txt").write_text("".join(f"{x}\t{x.parent.name}\n" for x in files(source)))
    return {"root": str(to / "list.txt")}


def table(source: Path, to: Path, url: str) -> dict[str, Any]:
    """Relative to a base."""
    with open(to / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["who", "where", "what"])
        for each in files(source):
            rows.writerow(["me", each.relative_to(source), each.parent.name])
    columns = {"path_column": "where", "label_column": "what"}
    return {"root": str(to / "list.csv"), "base": str(source), **columns}


def parquet(source: Path, to: Path, url: str) -> dict[str, Any]:
    """Every other one in an object store."""
    names = [str(each.relative_to(source)) for each in files(source)]
    upload(source, to, f"{url}/some")
    paths = [str(source / x) if k % 2 else f"{url}/some/{x}" for k, x in enumerate(names)]
    label = [name.split("/")[0] for name in names]
    pyarrow.parquet.write_table(
        pyarrow.table({"path": paths, "label": label}), to / "list.parquet", row_group_size=4
    )
    return {"root": str(to / "list.parquet")}


def urls(source: Path, to: Path, url: str) -> dict[str, Any]:
    upload(source, to, f"{url}/all")
    text = "".join(f"{x.relative_to(source)}\t{x.parent.name}\n" for x in files(source))
    (to / "urls.txt").write_text(text)
    return {"root": str(to / "urls.txt"), "base": f"{url}/all"}


def dataset(source: Path, to: Path, url: str) -> dict[str, Any]:
    names = sorted(each.name for each in source.iterdir())
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    rows = {
        "image": [{"path": None, "bytes": each.read_bytes()} for each in files(source)],
        "label": [names.index(each.parent.name) for each in files(source)],
    }
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(to / "dataset", num_shards=2)
    return {"root": str(to / "dataset")}


def tar(source: Path, to: Path, url: str) -> dict[str, Any]:
    command = ["pack", str(source), str(to / "store"), "--shard-mb", "1", "--workers", "1"]
    assert data.main(command) == 0
    return {"root": str(to / "store")}


def chunks(source: Path, to: Path, url: str) -> dict[str, Any]:
    return {**tar(source, to, url), "shuffle": "chunks", "chunk_mb": 1, "window": 1}


def remote(source: Path, to: Path, url: str) -> dict[str, Any]:
    tar(source, to, url)
    upload(to / "store", to, f"{url}/store")
    return {"root": f"{url}/store", "chunk_mb": 1, "window": 1}


def upload(source: Path, to: Path, url: str) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    assert bucket == object_server.BUCKET
    object_server.upload((to / "endpoint").read_text(), source, prefix)


EXAMPLES = {
    "folder": Example("folder", folder),
    "list txt": Example("list", lines),
    "list csv": Example("list", table),
    "list parquet": Example("list", parquet, finds="reading"),
    "list s3": Example("list", urls, finds="reading"),
    "hf": Example("hf", dataset),
    "tar": Example("tar", tar, finds="storing"),
    "tar chunks": Example("tar", chunks, finds="storing"),
    "tar s3": Example("tar", remote, finds="storing"),
}
