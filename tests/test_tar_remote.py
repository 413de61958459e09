"""Tar stores under s3://: batches as from a disk, through all faults, and nothing left over."""

import gc
import hashlib
import io
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastssl import data, loader, order, train
from pipelines import single_view
from pipelines.readers import object_requests, tar, tar_remote, tar_store
from pipelines.readers.object_store import Unreachable
from tests import object_server
from tests.packing import write_manifest
from tests.small_run import SMALL, assert_same_run, lines
from tests.small_run import STEPS as STEPS_OF_RUN

URL = f"s3://{object_server.BUCKET}/stores"
FORMS = ("original", "raw")
IMAGES, BATCH, STEPS = 60, 8, 8  # steps of an epoch, the last one filled up
PASSING = ("500", "503", "close", "cut", "cut 100", "short", "long", "whole", "garbage", "flip")
IMPATIENT: dict[str, Any] = {"retries": 2, "timeout_s": 2, "requests": 4}


@pytest.fixture(scope="module")
def stores(demo_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sixty of the built-in images in their ten classes, as a store of each form."""
    root = tmp_path_factory.mktemp("stores")
    for file in sorted((demo_images / "train").glob("*/0000[0-5].jpg")):
        target = root / "images" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    assert len(list(root.glob("images/*/*.jpg"))) == IMAGES
    for form in FORMS:
        size = [] if form == "original" else ["--short-side", "64"]
        command = ["pack", str(root / "images"), str(root / form), "--form", form]
        assert data.main([*command, *size, "--shard-mb", "1", "--workers", "1"]) == 0
    return {form: root / form for form in FORMS}


@pytest.fixture(scope="module")
def server(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with object_server.store(tmp_path_factory.mktemp("moto")) as endpoint:
        for form, folder in stores.items():
            object_server.upload(endpoint, folder, f"stores/{form}")
        yield endpoint


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[object_server.Proxy]:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in object_server.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_requests, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(object_requests, "LONGEST_PAUSE", 0.02)
    with object_server.Proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
        gc.collect()  # whoever failed asks no more


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shards(stores: dict[str, Path], server: str, tmp_path: Path) -> tuple[str, Path]:
    """A store of three shards: its url, and where it was packed."""
    root, source = tmp_path / "shards", stores["original"].parent / "images"
    how = ["--form", "raw", "--shard-mb", "1", "--workers", "1"]
    assert data.main(["pack", str(source), str(root), *how]) == 0
    assert len(list(root.glob("*.tar"))) == 3
    object_server.upload(server, root, "stores/shards")
    return f"{URL}/shards", root


@pytest.fixture
def bad_store(stores: dict[str, Path], server: str, tmp_path: Path) -> tuple[str, int]:
    """A store one of whose images can't be decoded, though its checksum is right: url and row."""
    root, row = tmp_path / "bad", 17
    shutil.copytree(stores["original"], root)
    columns = {name: np.load(root / "index" / f"{name}.npy") for name in tar_store.COLUMNS}
    manifest = json.loads((root / "manifest.json").read_text())
    at, size = int(columns["offset"][row]), int(columns["size"][row])
    path = root / manifest["shards"][int(columns["shard"][row])]["name"]
    content = bytearray(path.read_bytes())
    content[at : at + size] = content[at : at + 200] + bytes(size - 200)  # a header, and no pixels
    path.write_bytes(content)
    columns["checksum"][row] = zlib.crc32(content[at : at + size])
    file = io.BytesIO()
    np.save(file, columns["checksum"])
    (root / "index" / "checksum.npy").write_bytes(file.getvalue())
    manifest["index"]["checksum"] = hashlib.sha256(file.getvalue()).hexdigest()
    write_manifest(root, manifest)
    object_server.upload(server, root, "stores/bad")
    return f"{URL}/bad", row


def opened(root: str | Path, cache: Path | None = None, **options) -> tar.Samples:
    given = tar.Options(root=str(root), **options)
    return tar.list_samples(given, cache=cache, say=print)


def rows_of(samples: tar.Samples, rank: int = 0, world: int = 1) -> Callable[[int], np.ndarray]:
    """As training orders them."""

    def plan(epoch: int) -> np.ndarray:
        if samples.chunks is None:
            return order.shuffled(len(samples.usable), 5, epoch, rank, world, BATCH)
        return order.by_chunks(samples.chunks, 5, epoch, rank, world, BATCH, samples.window)

    steps = len(plan(0))
    return lambda step: samples.usable[plan(step // steps)[step % steps]]


def batches(
    samples: tar.Samples,
    rows: Callable[[int], np.ndarray] | None = None,
    say: Callable[[str], None] = print,
) -> loader.Loader:
    return loader.Loader(
        tar,
        samples,
        single_view,
        single_view.Options(),
        rows or rows_of(samples),
        batch=BATCH,
        seed=3,
        device=torch.device("cpu"),
        loading=loader.Options(threads=2),
        say=say,
    )


def taken(of: loader.Loader, steps: int) -> list[dict[str, torch.Tensor]]:
    return [{name: value.clone() for name, value in next(of).items()} for _ in range(steps)]


def assert_same(
    found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]
) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def readers() -> int:
    return sum(thread.name.startswith("object-store") for thread in threading.enumerate())


def in_time(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 300
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_so()


def refusal(what: Callable[[], object]) -> str:
    """The one line that a user sees."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        what()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spans(proxy: object_server.Proxy) -> list[int]:
    """Bytes of the requests for images, in their order."""
    found = []
    for method, path, asked in proxy.requests:
        if method == "GET" and path.endswith(".tar"):
            first, last = asked.removeprefix("bytes=").split("-")
            found.append(int(last) - int(first) + 1)
    return found


# What is read


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shuffle", ["images", "chunks"])
def test_batches_are_those_of_the_same_store_on_a_disk(proxy, stores, cache, form, shuffle):
    near = opened(stores[form], shuffle=shuffle, chunk_mb=1)
    far = opened(f"{URL}/{form}/", cache, shuffle=shuffle, chunk_mb=1)
    one, other = batches(far), batches(near)
    found, expected = taken(one, 20), taken(other, 20)  # two epochs and a half
    one.close()
    other.close()

    assert_same(found, expected)
    assert far.fingerprint == near.fingerprint
    assert far.path(7).removeprefix(f"{URL}/{form}") == near.path(7).removeprefix(str(stores[form]))


def test_chunks_are_shuffled_from_an_object_store_and_images_from_a_disk(proxy, stores, cache):
    assert opened(stores["original"]).chunks is None
    assert opened(f"{URL}/original", cache).chunks is not None


@pytest.mark.parametrize("world", [1, 3])
def test_every_image_comes_in_an_epoch_over_all_ranks(proxy, cache, world):
    samples = opened(f"{URL}/raw", cache, chunk_mb=1, window=1)
    steps = order.steps_per_epoch(IMAGES, world, BATCH)
    seen: list[int] = []
    for rank in range(world):
        one = batches(samples, rows_of(samples, rank, world))
        seen += [int(row) for each in taken(one, steps) for row in each["index"]]
        one.close()

    assert set(seen) == set(range(IMAGES))
    assert len(seen) == steps * world * BATCH


def once(samples: tar.Samples) -> Callable[[int], np.ndarray]:
    """The rows of one epoch, without those that fill the last step."""
    rows = np.concatenate([rows_of(samples)(step) for step in range(STEPS)])[:IMAGES]

    def given(step: int) -> np.ndarray:
        if step == STEPS:
            raise StopIteration
        return rows[step * BATCH :][:BATCH]

    return given


def test_a_chunk_comes_by_one_request_and_an_image_by_one_where_images_are_shuffled(proxy, cache):
    for options in ({"chunk_mb": 1, "window": 2}, {"shuffle": "images"}):
        samples = opened(f"{URL}/original", cache, **options)
        proxy.requests.clear()
        ahead = tar_remote.fetched(samples, once(samples))
        for step in range(STEPS):
            ahead.step(step)
        ahead.close()

        assert len(spans(proxy)) == (IMAGES if samples.chunks is None else len(samples.chunks))
    assert opened(f"{URL}/original", cache, chunk_mb=1).chunks is not None


def test_what_is_not_needed_does_not_travel(proxy, cache, monkeypatch):
    monkeypatch.setattr(tar_remote, "GAP", 5000)
    samples = opened(f"{URL}/original", cache, limit=10)
    proxy.requests.clear()
    ahead = tar_remote.fetched(samples, lambda step: np.arange(10))
    found = ahead.step(0)
    ahead.close()

    assert sum(spans(proxy)) == sum(map(len, found)) == int(samples.size.sum())


def test_a_resumed_loader_goes_on_bit_for_bit_and_fetches_the_rest_of_its_window(proxy, cache):
    samples = opened(f"{URL}/original", cache, chunk_mb=1, window=99)
    whole = batches(samples)
    taken(whole, 5)
    state = whole.state()
    expected = taken(whole, 6)
    whole.close()
    fresh = batches(samples, once(samples))
    fresh.resume(state)
    proxy.requests.clear()
    found = taken(fresh, 1)
    fresh.close()
    again = batches(samples)
    again.resume(state)
    more = taken(again, 6)
    again.close()

    assert_same(found, expected[:1])
    assert_same(more, expected)


def test_the_index_is_fetched_once_a_machine(proxy, tmp_path):
    root, kept = f"{URL}/original", tmp_path / "cache"
    one = opened(root, kept)
    first = [path for _, path, _ in proxy.requests]
    proxy.requests.clear()
    other = opened(root, kept)
    second = [path for _, path, _ in proxy.requests]

    assert len([path for path in first if path.endswith(".npy")]) == 2 * len(tar_store.COLUMNS)
    assert len([path for path in first if path.endswith(".tar")]) == len(one.files)
    assert second == ["/pictures/stores/original/manifest.json"]
    np.testing.assert_array_equal(one.offset, other.offset)
    base = one.offset.base
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert not isinstance(base, np.ndarray)  # a mapped file: processes share it


def test_without_a_cache_nothing_stays_on_the_disk(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    samples = opened(f"{URL}/original")

    assert list(tmp_path.iterdir()) == []
    assert int(samples.size.sum()) > 0


# Faults


def test_batches_are_the_same_through_every_passing_fault(proxy, stores, cache):
    near = opened(stores["original"], shuffle="chunks", chunk_mb=1)
    far = opened(f"{URL}/original", cache, chunk_mb=1, retries=50, timeout_s=5, requests=8)
    chosen = np.random.default_rng(2)
    lock = threading.Lock()

    def fault(number: int, path: str) -> str | None:
        with lock:
            is_faulty = path.endswith(".tar") and chosen.random() < 0.3
            return str(chosen.choice(PASSING)) if is_faulty else None

    proxy.fault = fault
    one, other = batches(far), batches(near)
    found, expected = taken(one, 20), taken(other, 20)
    one.close()
    other.close()

    assert_same(found, expected)
    assert one.skipped == {}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("503", "the store answered 503 SlowDown (tried 3 times in "),
        ("hang", "not a byte came for 2 s (tried 3 times in "),
        ("403", "access was refused (403 AccessDenied): set AWS_ACCESS_KEY_ID"),
        ("404", "there is no such object (404 NoSuchKey)"),
        ("flip", "is not what was packed (CRC-32): is it still the shard that the index is of?"),
    ],
)
def test_a_fault_that_stays_ends_the_loader_in_one_line_and_blames_no_image(
    proxy, cache, fault, said
):
    before = readers()
    samples = opened(f"{URL}/original", cache, shuffle="images", **IMPATIENT)
    lines: list[str] = []
    one = batches(samples, say=lines.append)
    taken(one, 1)
    proxy.fault = lambda number, path: fault if path.endswith(".tar") else None
    rows = rows_of(samples)
    other = batches(samples, lambda step: rows(step + 3), say=lines.append)
    with pytest.raises(Unreachable, match=r"^s3://pictures/stores/original/shard-0") as caught:
        next(other)
    one.close()
    other.close()

    assert "\n" not in str(caught.value)
    assert said in str(caught.value)
    assert other.skipped == {}
    assert lines == []
    assert in_time(lambda: readers() == before)


def test_a_shard_that_was_replaced_is_told_and_named(proxy, stores, server, cache):
    object_server.upload(server, stores["original"], "stores/replaced")
    samples = opened(f"{URL}/replaced", cache)
    place = "stores/replaced/shard-000000.tar"
    old = (stores["original"] / "shard-000000.tar").read_bytes()
    with object_server.client(server) as speaker:
        speaker.put_object(Bucket=object_server.BUCKET, Key=place, Body=old[::-1])
    one = batches(samples)

    found = refusal(lambda: next(one))
    one.close()
    assert f"{URL}/replaced/shard-000000.tar: what came for {URL}/replaced/" in found


def test_an_image_that_cannot_be_decoded_is_skipped_and_no_thread_is_left(proxy, bad_store, cache):
    url, row = bad_store
    before = readers()
    samples = opened(url, cache, chunk_mb=1)
    one = batches(samples)
    found = taken(one, STEPS)
    one.close()

    assert list(one.skipped) == [row]
    assert row not in {int(each) for batch in found for each in batch["index"]}
    gc.collect()
    assert in_time(lambda: readers() == before)


def test_loaders_that_are_closed_rebuilt_and_forgotten_leave_no_thread(proxy, cache):
    before = readers()
    samples = opened(f"{URL}/raw", cache)
    for _ in range(3):
        one = batches(samples)
        taken(one, 2)
        state = one.state()
        one.close()
        assert in_time(lambda: readers() == before)  # all others were let go
        taken(one, 1)
        one.resume(state)
        taken(one, 1)
        one.close()
        del one
        gc.collect()

    assert in_time(lambda: readers() == before)


# What can't be opened


def test_a_place_without_a_store_is_told_how_to_get_one(proxy):
    found = refusal(lambda: opened("s3://pictures/nothing"))

    assert found.startswith("data.root: s3://pictures/nothing is no tar store (it has no manifest")
    assert "aws s3 cp --recursive STORE s3://pictures/nothing" in found


def test_a_store_that_cannot_be_reached_is_told_before_anything_is_read(proxy):
    proxy.fault = lambda number, path: "503"
    found = refusal(lambda: opened(f"{URL}/raw", **IMPATIENT))

    assert found.startswith(f"data.root: {URL}/raw/manifest.json: the store answered 503")


def test_an_index_that_is_not_the_manifests_is_refused(proxy, stores, server, tmp_path):
    object_server.upload(server, stores["raw"], "stores/mixed")
    other = (stores["original"] / "index" / "offset.npy").read_bytes()
    with object_server.client(server) as speaker:
        key = "stores/mixed/index/offset.npy"
        speaker.put_object(Bucket=object_server.BUCKET, Key=key, Body=other)

    found = refusal(lambda: opened(f"{URL}/mixed", tmp_path))
    assert found.startswith(f"data.root: {URL}/mixed/index/offset.npy: its SHA-256 is not ")


@pytest.mark.parametrize("is_kept", [True, False])
def test_shards_that_are_missing_or_cut_off_are_named_at_the_start(
    proxy, shards, server, tmp_path, is_kept
):
    url, root = shards
    cache = tmp_path / "cache" if is_kept else None
    place = {"Bucket": object_server.BUCKET, "Key": "stores/shards/shard-000001.tar"}
    cut = {**place, "Key": "stores/shards/shard-000002.tar"}
    content = (root / "shard-000002.tar").read_bytes()
    with object_server.client(server) as speaker:
        speaker.delete_object(**place)
        speaker.put_object(**cut, Body=content[:-1000])
    found = refusal(lambda: opened(url, cache))
    again = refusal(lambda: opened(url, cache))
    object_server.upload(server, root, "stores/shards")
    assert len(opened(url, cache)) == IMAGES

    assert found == again
    size = len(content)
    assert found.startswith(
        f"data.root: 2 of 3 shards of {url} are not as manifest.json says:"
        f" shard-000001.tar (missing), shard-000002.tar ({size - 1000:,} bytes, not {size:,}): "
    )
    assert f"upload them again (aws s3 sync STORE {url})" in found


def test_shards_are_looked_at_once_a_start_and_at_the_next_one_again(
    proxy, shards, tmp_path, monkeypatch
):
    url, _ = shards

    def asked() -> int:
        proxy.requests.clear()
        samples = opened(url, tmp_path / "cache")
        found = len([1 for method, path, _ in proxy.requests if path.endswith(".tar")])
        assert found in (0, len(samples.files))
        return found

    monkeypatch.setattr(tar_remote, "LOOKED", 1e6)
    assert asked() > 0
    assert asked() == 0
    monkeypatch.setattr(tar_remote, "LOOKED", 0.0)
    assert asked() > 0


def test_shards_are_asked_for_through_faults_that_pass_and_told_in_a_line_of_one_that_stays(
    proxy, shards
):
    url, _ = shards
    seen: set[str] = set()

    def first(number: int, path: str) -> str | None:
        fault = "503" if path.endswith(".tar") and path not in seen else None
        seen.add(path)
        return fault

    proxy.fault = first
    assert len(opened(url, **IMPATIENT)) == IMAGES
    proxy.fault = lambda number, path: "503" if path.endswith("2.tar") else None
    assert refusal(lambda: opened(url, **IMPATIENT)).startswith(
        f"data.root: {url}/shard-000002.tar: the store answered 503 (tried 3 times in "
    )


@pytest.mark.parametrize(
    "value", [{"verify": True}, {"retries": -1}, {"timeout_s": 0.0}, {"requests": 0}]
)
def test_options_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match=next(iter(value))):
        tar.Options(root="s3://bucket/store", **value)


# Training


@pytest.mark.parametrize(
    ("fault", "ends_in", "code"),
    [
        ("503", "manifest.json", 1),
        ("503", ".npy", 1),
        ("503", ".tar", 1),
        ("403", "manifest.json", 2),
        ("404", "manifest.json", 2),
        ("404", ".tar", 2),
    ],
)
def test_an_outage_at_the_start_is_no_mistake_in_the_recipe(
    proxy, recipe, tmp_path, capsys, monkeypatch, fault, ends_in, code
):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    proxy.fault = lambda number, path: fault if path.endswith(ends_in) else None
    of = ["data.use=pipelines.readers.tar", f"data.root={URL}/original", "data.retries=1"]

    assert train.main([str(recipe), *of, f"train.out={tmp_path / 'run'}"]) == code
    assert capsys.readouterr().err.startswith("error: data.root: ")


def test_training_from_an_object_store_goes_on_where_it_went_away(
    proxy, stores, recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tar_remote, "AHEAD", 1)  # else a step's wait brings all forty images
    small = [*SMALL, "data.use=pipelines.readers.tar", "data.shuffle=images", "data.limit=40"]
    far = [str(recipe), f"data.root={URL}/original", *small, "data.retries=2", "data.timeout_s=5"]
    near = [str(recipe), f"data.root={stores['original']}", *small]
    assert train.main([*near, f"train.out={tmp_path / 'near'}"]) == 0
    capsys.readouterr()
    proxy.fault = lambda number, path: "503" if len(spans(proxy)) > 75 else None
    assert train.main([*far, f"train.out={tmp_path / 'far'}"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    steps = len(lines(tmp_path / "far"))
    proxy.fault = lambda number, path: None
    assert train.main([*far, f"train.out={tmp_path / 'far'}"]) == 0

    assert f"{URL}/original/shard-0" in last
    assert "the store answered 503 SlowDown (tried 3 times in " in last
    assert "the same command goes on from " in last
    assert 4 < steps < STEPS_OF_RUN
    assert_same_run(tmp_path / "far", tmp_path / "near")
