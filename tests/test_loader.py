"""The loader: zero-copy channels-last batches, exact state, files that fail while training."""

import gc
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import order
from fastssl.loader import DataError, Loader, Options, output_names, threads_per_process
from pipelines import evaluation, jigsaw, pirl_jigsaw, single_view
from pipelines.readers import folder

COUNT = 40
SMALL = pirl_jigsaw.Options(image_size=32, patches_crop=48, patch=12)
SINGLE = single_view.Options(image_size=32)
JIGSAW = jigsaw.Options(resize=54, crop=48, patch=12, permutations=24)


@pytest.fixture
def images(tmp_path: Path, demo_images: Path) -> Path:
    """Forty of the built-in images in a folder of the test's own."""
    files = sorted((demo_images / "val").glob("*/*.jpg"))
    root = tmp_path / "images"
    root.mkdir()
    for number, file in enumerate(files[:: len(files) // COUNT][:COUNT]):
        shutil.copy(file, root / f"{number:03d}.jpg")
    return root


def listing(root: Path) -> folder.Samples:
    return folder.list_samples(folder.Options(root=str(root)), cache=None, say=lambda _: None)


def loader(samples, *, batch=8, seed=1, graph=(pirl_jigsaw, SMALL), said=None, **loading):
    usable = samples.usable
    steps = order.steps_per_epoch(len(usable), 1, batch)

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, steps)
        return usable[order.shuffled(len(usable), 7, epoch, 0, 1, batch)[step]]

    return Loader(
        folder,
        samples,
        graph[0],
        graph[1],
        rows,
        batch=batch,
        seed=seed,
        device=torch.device("cpu"),
        loading=Options(**{"threads": 2, **loading}),
        say=(said if said is not None else []).append,
    )


def take(batches: Loader, count: int) -> list[dict[str, torch.Tensor]]:
    return [{k: v.clone() for k, v in next(batches).items()} for _ in range(count)]


def assert_same(some: list, others: list) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def damage(path: Path) -> None:
    """Leaves a JPEG's header and end as they are and makes nonsense of its Huffman table."""
    whole = bytearray(path.read_bytes())
    table = whole.index(b"\xff\xc4")
    whole[table + 5 : table + 21] = b"\xff" * 16
    path.write_bytes(bytes(whole))


def test_tensors_are_channels_last_views_with_names_types_and_shapes(images):
    batch = next(loader(listing(images)))

    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["patches"].shape == (8, 9, 3, 12, 12)
    together = batch["patches"].flatten(0, 1)
    assert together.is_contiguous(memory_format=torch.channels_last)
    assert together.data_ptr() == batch["patches"].data_ptr()
    assert batch["permutation"].shape == (8, 9)
    assert batch["index"].shape == (8,)
    assert {t.dtype for t in batch.values()} == {torch.uint8, torch.int64}


def test_a_batch_that_is_held_is_not_overwritten_by_later_ones(images):
    batches = loader(listing(images))
    held = next(batches)
    copy = held["image"].clone()
    take(batches, 12)

    assert torch.equal(held["image"], copy)


def test_an_epoch_gives_every_image_once_and_names_it_by_its_row(images):
    samples = listing(images)
    plain = (evaluation, evaluation.Options(resize=32, crop=32))
    batches = take(loader(samples, graph=plain), 5)
    by_row = {int(i): x for b in batches for i, x in zip(b["index"], b["image"], strict=True)}
    alone = loader(samples, batch=1, graph=plain)

    assert sorted(by_row) == list(range(COUNT))
    for _ in range(5):
        one = next(alone)
        assert torch.equal(one["image"][0], by_row[int(one["index"])])


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6, 11, 63, 64, 65, 70])  # an epoch has 5 steps
def test_resume_is_exact_after_any_step(images, stop):
    samples = listing(images)
    through = loader(samples)
    take(through, stop)
    state = through.state()
    # Once a batch was given the state's seed counts, not the argument.
    resumed = loader(samples, seed=99 if stop else 1, threads=1, prefetch=3)
    resumed.resume(state)

    assert_same(take(resumed, 7), take(through, 7))
    assert resumed.step == stop + 7


def test_state_taken_twice_or_resumed_twice_is_the_same(images):
    samples = listing(images)
    through = loader(samples)
    take(through, 4)
    first, second = through.state(), through.state()
    resumed = loader(samples)
    resumed.resume(first)
    again = loader(samples)
    again.resume(resumed.state())

    assert torch.equal(first["dali"], second["dali"])
    assert_same(take(again, 3), take(through, 3))


def test_one_seed_repeats_and_another_differs(images):
    samples = listing(images)
    first, again, other = (take(loader(samples, seed=seed), 2) for seed in (1, 1, 2))

    assert_same(first, again)
    assert (first[0]["image"] != other[0]["image"]).any()
    assert torch.equal(first[0]["index"], other[0]["index"])  # the order has a seed of its own


def test_a_file_that_fails_in_decoding_is_named_skipped_and_training_goes_on(images):
    damage(images / "017.jpg")
    samples, said = listing(images), []
    assert 17 in samples.usable  # the header scan could not know
    batches = take(loader(samples, said=said), 10)

    assert len(said) == 1
    assert "017.jpg" in said[0]
    assert "skipping" in said[0]
    seen = torch.cat([b["index"] for b in batches[:5]]).tolist()
    assert sorted(seen) == sorted([row for row in range(COUNT) if row != 17] + [18])
    assert 17 not in torch.cat([b["index"] for b in batches]).tolist()


@pytest.mark.parametrize("stop", [0, 2, 4, 6])
def test_resume_is_exact_around_a_file_that_fails(images, stop):
    for name in ("003.jpg", "017.jpg", "018.jpg"):
        damage(images / name)
    samples = listing(images)
    through = loader(samples)
    take(through, stop)
    resumed = loader(samples)
    resumed.resume(through.state())

    assert_same(take(resumed, 9), take(through, 9))
    assert {3, 17, 18} == set(through.skipped) == set(resumed.skipped)


def test_a_file_deleted_while_training_is_skipped(images):
    said = []
    batches = loader(listing(images), said=said)
    take(batches, 1)
    (images / "005.jpg").unlink()
    take(batches, 10)

    assert ["005.jpg" in line for line in said] == [True]


@pytest.mark.parametrize("damage", [Path.unlink, damage], ids=["deleted", "damaged"])
def test_a_file_lost_after_it_was_given_does_not_hinder_the_skipping_of_another(images, damage):
    said = []
    batches = loader(listing(images), said=said)
    seen = torch.cat([batch["index"] for batch in take(batches, 2)]).tolist()
    first, unseen = seen[0], next(row for row in range(COUNT) if row not in seen)
    for row in (first, unseen):  # the second's batch is made anew, and so are those before it
        damage(images / f"{row:03}.jpg")
    take(batches, 10)

    assert sorted(batches.skipped) == sorted([first, unseen])
    assert len(said) == 2


def test_a_disk_that_fails_for_a_moment_costs_no_image(images, monkeypatch):
    samples, usual = listing(images), Loader._failures
    wanted = take(loader(samples), 8)
    aside = images.with_name("aside")

    def back_again(self, rows):
        if aside.exists():
            aside.rename(images)
        return usual(self, rows)

    monkeypatch.setattr(Loader, "_failures", back_again)
    said = []
    batches = loader(samples, said=said)
    first = take(batches, 1)
    images.rename(aside)

    assert_same(first + take(batches, 7), wanted)
    assert not aside.exists()  # it did fail
    assert (batches.skipped, said) == ({}, [])


@pytest.mark.parametrize("batch", [1, 2])
def test_bad_files_that_make_up_a_batch_are_skipped_as_others_are(images, batch):
    gone = order.shuffled(COUNT, 7, 0, 0, 1, batch)[3].tolist()
    for row in gone:
        damage(images / f"{row:03}.jpg")
    samples, said, single = listing(images), [], (single_view, SINGLE)
    through = loader(samples, batch=batch, graph=single, said=said)
    begin = take(through, 2)
    before = through.state()
    begin += take(through, 3)
    resumed = [loader(samples, batch=batch, graph=single) for _ in range(2)]
    for each, state in zip(resumed, (before, through.state()), strict=True):
        each.resume(state)
    rest = take(through, COUNT // batch - 5)
    seen = torch.cat([each["index"] for each in begin + rest]).tolist()

    assert sorted(through.skipped) == sorted(gone)
    assert len(said) == batch
    assert {*seen} == {*range(COUNT)} - {*gone}
    assert_same(take(resumed[0], 8), (begin + rest)[2:10])
    assert_same(take(resumed[1], 5), rest[:5])


def test_a_disk_that_comes_back_while_a_batch_is_looked_at_costs_no_image(images, monkeypatch):
    samples, usual = listing(images), Loader._refuse_outage
    wanted = take(loader(samples), 8)
    aside = images.with_name("aside")

    def back_again(self, rows, reason, error):
        aside.rename(images)
        usual(self, rows, reason, error)

    monkeypatch.setattr(Loader, "_refuse_outage", back_again)
    batches = loader(samples)
    first = take(batches, 1)
    images.rename(aside)

    assert_same(first + take(batches, 7), wanted)
    assert not aside.exists()  # it did fail
    assert batches.skipped == {}


@pytest.mark.parametrize("batch", [1, 8])
def test_a_folder_that_vanishes_while_training_is_an_error_that_names_it(images, batch):
    batches = loader(listing(images), batch=batch)
    take(batches, 1)
    shutil.rmtree(images)

    with pytest.raises(DataError, match=r"is .*images still there and readable"):
        take(batches, 20)
    assert batches.skipped == {}


def test_a_graph_that_can_not_be_built_is_no_files_fault(images):
    def refuse(image, index, options, device):
        raise RuntimeError("no such decoder here")

    said = []
    batches = loader(listing(images), graph=(SimpleNamespace(graph=refuse), None), said=said)

    with pytest.raises(RuntimeError, match="no such decoder here"):
        next(batches)
    assert said == []
    assert batches.skipped == {}


def test_the_names_a_graph_puts_out_are_known_without_running_it(images):
    names = output_names(folder, listing(images), pirl_jigsaw, SMALL)

    assert sorted(names) == ["image", "index", "patches", "permutation"]


def test_waiting_is_counted_once(images):
    batches = loader(listing(images))
    take(batches, 3)

    assert batches.data_wait() > 0
    assert batches.data_wait() == 0


@pytest.mark.parametrize("graph", [(pirl_jigsaw, SMALL), (single_view, SINGLE)])
def test_threads_and_prefetching_change_no_pixel(images, graph):
    samples = listing(images)
    one = take(loader(samples, graph=graph, threads=1, prefetch=1), 3)

    assert_same(one, take(loader(samples, graph=graph, threads=3, prefetch=4), 3))


@pytest.mark.parametrize("region", [True, False])
@pytest.mark.parametrize("decoder", ["auto", "cpu"])
def test_every_way_to_decode_is_resumed_exactly(images, decoder, region):
    samples, graph = listing(images), (single_view, SINGLE)
    through = loader(samples, graph=graph, decoder=decoder, region=region)
    first = take(through, 3)
    resumed = loader(samples, graph=graph, decoder=decoder, region=region)
    resumed.resume(through.state())

    assert first[0]["image"].shape == (8, 3, 32, 32)
    assert_same(take(resumed, 3), take(through, 3))


@pytest.mark.parametrize(("threads", "taken"), [(None, threads_per_process(1)), (3, 3)])
def test_without_threads_all_cores_allowed_are_taken(images, threads, taken):
    given = loader(listing(images), threads=threads)
    next(given)

    assert given._running().num_threads == taken


def test_a_closed_loader_frees_its_threads_and_goes_on_where_it_was(images):
    samples = listing(images)
    through, closed = loader(samples), loader(samples)
    other = loader(samples)
    take(other, 2)  # the process's first loader starts threads that stay
    other.close()
    gc.collect()  # what earlier tests dropped
    before = threads_of_this_process()
    take(closed, 2)
    assert threads_of_this_process() > before
    closed.close()

    assert threads_of_this_process() == before
    assert_same(take(closed, 2), take(through, 4)[2:])


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("graph", [(single_view, SINGLE), (jigsaw, JIGSAW)], ids=["crop", "255"])
def test_a_damage_that_only_some_crops_meet_is_named_and_left_out(tmp_path, graph, seed):
    y, x = np.mgrid[0:200, 0:300]
    for name in range(24):
        pixels = np.stack([(x + name) % 256, y, x * y % 256], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name:02}.jpg", quality=90)
    samples = listing(tmp_path)
    content = (tmp_path / "05.jpg").read_bytes()  # from here on a disk fails
    lost = len(content) // 10
    (tmp_path / "05.jpg").write_bytes(content[:-lost] + bytes(lost))
    lines: list[str] = []
    given = loader(samples, graph=graph, seed=seed, said=lines)
    take(given, 40)

    assert list(given.skipped) == [5]
    assert len(lines) == 1
    assert "05.jpg" in lines[0]


def test_region_and_whole_decoding_give_the_same_crops_of_a_jpeg(tmp_path):
    smooth = np.linspace(0, 255, 200 * 160 * 3).reshape(200, 160, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image = Image.fromarray(smooth.astype(np.uint8))
    for name, options in {"a": {}, "b": {"subsampling": 0}, "c": {"exif": exif}}.items():
        image.save(tmp_path / f"{name}.jpg", quality=95, **options)
    samples = listing(tmp_path)
    part, whole = (
        take(loader(samples, graph=(jigsaw, JIGSAW), batch=3, region=region), 4)
        for region in (True, False)
    )

    for one, other in zip(part, whole, strict=True):
        apart = (one["patches"].int() - other["patches"].int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threads": 0}, "threads (0) must be in 1 ... 1024, or null for a share of the cores"),
        ({"threads": 2**70}, "must be in 1 ... 1024, or null for a share of the cores"),
        ({"prefetch": -1}, "prefetch (-1) must be in 1 ... 1024"),
        ({"decoder": "gpu"}, "decoder ('gpu') must be auto or cpu"),
        ({"hw_decoder_load": -0.1}, "hw_decoder_load (-0.1) must be in 0 ... 1"),
        ({"decoder_width": -1, "decoder_height": 9}, "decoder_width (-1) must be in 0 ... 65535"),
        ({"decoder_width": 9, "decoder_height": 65_536}, "decoder_height (65536) must be in 0 ..."),
        ({"decoder_width": 9}, "decoder_width (9) and decoder_height (0) go together: give both"),
        ({"decoder_device_mib": 2048}, "decoder_device_mib (2048) must be in 0 ... 2047 MiB"),
        ({"decoder_host_mib": -1}, "decoder_host_mib (-1) must be in 0 ... 2047 MiB"),
    ],
)
def test_settings_that_can_not_be_are_refused_with_the_remedy(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Options(**wrong)


def test_threads_are_the_cores_allowed_divided_by_the_processes_here():
    alone = threads_per_process(1)

    assert 1 <= alone <= 4096
    assert threads_per_process(alone) == 1
    assert threads_per_process(10 * alone) == 1
