"""What every reader keeps to, on the same images stored in the way of each.

A new reader needs a line in tests/reader_examples.py, and passes here as it is.
"""

import gc
import hashlib
import importlib
import json
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import loader, order
from pipelines import evaluation, single_view
from tests import few_images, object_server, reader_examples
from tests.reader_examples import COUNTS, EXAMPLES

CHECKOUT = Path(__file__).resolve().parents[1]
READERS = sorted(
    path.stem
    for path in (CHECKOUT / "pipelines" / "readers").glob("*.py")
    if "\nclass Options" in path.read_text()
)
COUNT = sum(COUNTS.values())
COMMON = {"root", "bad", "limit", "fraction", "per_class", "subset_seed", "quarantine"}
RANDOM = (single_view, single_view.Options(image_size=32))
WHOLE = (evaluation, evaluation.Options(resize=36, crop=32))
AT_LISTING = [name for name, example in EXAMPLES.items() if example.finds == "listing"]

every_example = pytest.mark.parametrize("name", EXAMPLES)


@pytest.fixture(scope="module", autouse=True)
def _cheap_closing() -> Iterator[None]:
    """A loader that is closed looks through all objects: not those of torch, a hundred times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An object store for all tests of the file; this process's environment leads to it."""
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch, object_server.store(folder) as found:
        for key, value in object_server.KEYS.items():
            patch.setenv(key, value)
        patch.setenv("AWS_ENDPOINT_URL", found)
        patch.setenv("AWS_REGION", "us-east-1")
        yield found


class Shelf:
    """The images of a folder, in the way of each example; made when first asked for."""

    def __init__(self, source: Path, to: Path, endpoint: str) -> None:
        self.source, self.to, self.endpoint = source, to, endpoint
        self.made: dict[str, dict[str, Any]] = {}

    def options(self, name: str, **more: Any) -> Any:
        if name not in self.made:
            to = self.to / name.replace(" ", "_")
            to.mkdir(parents=True)
            (to / "endpoint").write_text(self.endpoint)
            key = hashlib.sha256(str(to).encode()).hexdigest()[:16]
            url = f"s3://{object_server.BUCKET}/{key}"
            self.made[name] = EXAMPLES[name].store(self.source, to, url)
        return reader(name).Options(**{**self.made[name], **more})

    def listed(self, name: str, cache: Path | None = None, **more: Any) -> tuple[Any, list[str]]:
        """The listing, and the lines that were said."""
        said: list[str] = []
        options = self.options(name, **more)
        return reader(name).list_samples(options, cache=cache, say=said.append), said


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Shelf:
    """Thirteen images of three classes."""
    to = tmp_path_factory.mktemp("sound")
    return Shelf(reader_examples.images(to / "source"), to / "stored", endpoint)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Shelf:
    """The same, but the decoder refuses number 6, whose header and end are sound."""
    to = tmp_path_factory.mktemp("damaged")
    source = reader_examples.images(to / "source")
    few_images.damage(reader_examples.files(source)[6])
    return Shelf(source, to / "stored", endpoint)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Shelf:
    """The same, but number 6 is no image at all."""
    to = tmp_path_factory.mktemp("spoilt")
    source = reader_examples.images(to / "source")
    reader_examples.files(source)[6].write_bytes(b"<html>404</html>")
    return Shelf(source, to / "stored", endpoint)


def reader(name: str) -> types.ModuleType:
    return importlib.import_module(f"pipelines.readers.{EXAMPLES[name].reader}")


def batches(
    name: str,
    samples: Any,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 4,
    seed: int = 7,
    graph: tuple[types.ModuleType, Any] = RANDOM,
    said: list[str] | None = None,
) -> loader.Loader:
    """As train.py makes them."""
    usable = samples.usable

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, order.steps_per_epoch(len(usable), world, batch))
        if samples.chunks is None:
            return usable[order.shuffled(len(usable), seed, epoch, rank, world, batch)[step]]
        chunks, window = samples.chunks, samples.window
        return usable[order.by_chunks(chunks, seed, epoch, rank, world, batch, window)[step]]

    return loader.Loader(
        reader(name),
        samples,
        graph[0],
        graph[1],
        rows,
        batch=batch,
        seed=1 + rank,
        device=torch.device("cpu"),
        loading=loader.Options(threads=2),
        say=(said if said is not None else []).append,
    )


def take(given: loader.Loader, count: int) -> list[dict[str, torch.Tensor]]:
    taken = [{key: value.clone() for key, value in next(given).items()} for _ in range(count)]
    given.close()
    return taken


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def indices(taken: list[dict[str, torch.Tensor]]) -> list[int]:
    return torch.cat([each["index"] for each in taken]).tolist()


def assert_same(some: list, others: list) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


def quarantine(to: Path, shelf: Shelf, name: str, row: int) -> str:
    """A file that quarantines a row, by the name that the listing has for it."""
    options = shelf.options(name)
    base = f"{vars(options).get('base') or options.root}/"
    listed = shelf.listed(name)[0].path(row).removeprefix(base)
    file = to / "quarantine.jsonl"
    file.write_text(json.dumps({"name": listed, "reason": "grey"}) + "\n")
    return str(file)


def test_every_reader_has_an_example():
    assert len(READERS) >= 4
    assert {example.reader for example in EXAMPLES.values()} == set(READERS)


@every_example
def test_it_offers_what_recipes_and_the_library_ask_for(name, sound):
    module = reader(name)
    samples, _ = sound.listed(name)

    assert {each.name for each in fields(module.Options)} >= COMMON
    assert all(line not in vars(module.Options) for line in ("torch", "fastssl"))
    assert (samples.height.shape, samples.width.shape) == ((COUNT,), (COUNT,))
    assert samples.usable.dtype == samples.labels.dtype == np.int64
    assert samples.window >= 1
    assert samples.chunks is None or samples.chunks[-1] == COUNT
    assert isinstance(samples.written, str)


@every_example
def test_rows_are_the_images_in_order_with_their_labels_classes_and_sizes(name, sound):
    samples, _ = sound.listed(name)
    files = reader_examples.files(sound.source)
    sizes = [size_of(file) for file in files]
    known = samples.height > 0

    assert len(samples) == COUNT
    assert samples.usable.tolist() == list(range(COUNT))
    assert samples.bad == {}
    assert samples.classes == tuple(COUNTS)
    assert [samples.classes[k] for k in samples.labels] == [file.parent.name for file in files]
    assert known.all() == (EXAMPLES[name].finds != "reading")
    assert [(w, h) for w, h in zip(samples.width, samples.height, strict=True) if h] == [
        size for size, is_known in zip(sizes, known, strict=True) if is_known
    ]


@every_example
def test_the_index_of_an_image_is_its_row(name, sound):
    samples, _ = sound.listed(name)
    there, _ = sound.listed("folder")
    found = take(batches(name, samples, batch=COUNT, graph=WHOLE), 1)[0]
    wanted = take(batches("folder", there, batch=COUNT, graph=WHOLE), 1)[0]
    places, others = torch.argsort(found["index"]), torch.argsort(wanted["index"])

    assert torch.equal(found["index"][places], torch.arange(COUNT))
    assert torch.equal(found["image"][places], wanted["image"][others])
    assert len(torch.unique(found["image"].flatten(1), dim=0)) == COUNT


@every_example
def test_an_epoch_gives_each_image_once_over_all_ranks(name, sound):
    samples, _ = sound.listed(name)
    for world in (1, 2, 3):
        steps = order.steps_per_epoch(COUNT, world, 2)
        of_rank = [
            indices(take(batches(name, samples, rank=rank, world=world, batch=2), steps))
            for rank in range(world)
        ]
        seen = [index for indices in of_rank for index in indices]

        assert {len(each) for each in of_rank} == {2 * steps}
        assert set(seen) == set(range(COUNT))
        assert len(seen) - COUNT < 2 * world  # filled up to whole batches


@every_example
def test_the_order_is_told_by_seed_and_epoch(name, sound):
    samples, _ = sound.listed(name)
    again, _ = sound.listed(name)
    steps = order.steps_per_epoch(COUNT, 1, 4)
    first, second, other = (
        indices(take(batches(name, each, seed=seed, graph=WHOLE), 2 * steps))
        for each, seed in ((samples, 7), (again, 7), (samples, 8))
    )

    assert first == second
    assert first != other
    assert first[: 4 * steps] != first[4 * steps :]


@every_example
def test_resume_is_exact_to_the_bit(name, sound):
    samples, _ = sound.listed(name)
    taken = take(batches(name, samples), 9)  # an epoch has 4 steps
    stopped = batches(name, samples)
    for stop in (0, 1, 5):
        take(stopped, stop - stopped.step)
        resumed = batches(name, sound.listed(name)[0])
        resumed.resume(stopped.state())

        assert_same(take(resumed, 4), taken[stop : stop + 4])


@every_example
def test_an_image_that_fails_in_decoding_is_skipped_and_the_skip_is_resumed(name, damaged):
    samples, _ = damaged.listed(name)
    said: list[str] = []
    through = batches(name, samples, said=said)
    taken = [{key: value.clone() for key, value in next(through).items()} for _ in range(6)]
    resumed = batches(name, samples)
    resumed.resume(through.state())

    assert 6 in samples.usable
    assert list(through.skipped) == [6]
    assert [samples.path(6) in line for line in said] == [True]
    assert 6 not in indices(taken)
    assert set(indices(taken)) == set(range(COUNT)) - {6}
    assert_same(take(resumed, 5), take(through, 5))
    assert list(resumed.skipped) == [6]


@every_example
def test_what_is_no_image_is_never_given(name, spoilt):
    samples, said = spoilt.listed(name)
    finds = EXAMPLES[name].finds
    given = batches(name, samples)
    taken = take(given, 4)
    rows = range(COUNT - 1) if finds == "storing" else set(range(COUNT)) - {6}

    assert set(indices(taken)) == set(rows)
    assert list(samples.bad) == ([6] if finds == "listing" else [])
    assert bool(said) == (finds == "listing")
    assert list(given.skipped) == ([6] if finds == "reading" else [])


@pytest.mark.parametrize("name", AT_LISTING)
def test_bad_error_refuses_what_is_no_image_in_one_line(name, spoilt):
    with pytest.raises(ValueError, match=r"^data\.root: ") as caught:
        spoilt.listed(name, bad="error")

    assert "\n" not in str(caught.value)
    assert "HTML page" in str(caught.value)
    assert "data.bad=skip" in str(caught.value)


@every_example
def test_a_quarantined_image_keeps_its_row_and_is_not_given(name, sound, tmp_path):
    file = quarantine(tmp_path, sound, name, 6)
    samples, _ = sound.listed(name, quarantine=file, bad="error")  # it was looked at

    assert samples.bad == {6: "quarantined: grey"}
    assert len(samples) == COUNT
    assert samples.usable.tolist() == [row for row in range(COUNT) if row != 6]
    assert set(indices(take(batches(name, samples, graph=WHOLE), 4))) == set(samples.usable)


@every_example
def test_a_quarantine_that_names_others_is_told_and_one_that_is_not_there_refused(
    name, sound, tmp_path
):
    (tmp_path / "q.jsonl").write_text('{"name": "nobody.jpg", "reason": "grey"}\n')
    samples, said = sound.listed(name, quarantine=str(tmp_path / "q.jsonl"))

    assert samples.bad == {}
    assert [line for line in said if "nobody.jpg" in line]
    with pytest.raises(ValueError, match=r"^data\.quarantine: cannot read .*nothing\.jsonl"):
        sound.listed(name, quarantine=str(tmp_path / "nothing.jsonl"))


@every_example
def test_limit_takes_images_evenly_spaced(name, sound):
    samples, _ = sound.listed(name, limit=4)
    taken = take(batches(name, samples, graph=WHOLE), 1)[0]
    whole = take(batches(name, sound.listed(name)[0], batch=COUNT, graph=WHOLE), 1)[0]
    of_row = dict(zip(whole["index"].tolist(), whole["image"], strict=True))

    assert len(samples) == 4
    assert samples.usable.tolist() == [0, 1, 2, 3]
    for row, image in zip(taken["index"].tolist(), taken["image"], strict=True):
        assert torch.equal(image, of_row[[0, 4, 8, 12][row]])


@every_example
@pytest.mark.parametrize(
    ("asked", "counts"), [({"per_class": 2}, [2, 2, 2]), ({"fraction": 0.5}, [3, 2, 2])]
)
def test_a_subset_is_so_many_of_each_class_told_by_its_seed(name, asked, counts, sound):
    one, again, other = (sound.listed(name, **asked, subset_seed=seed)[0] for seed in (1, 1, 2))
    paths = [[each.path(row) for row in range(len(each))] for each in (one, again, other)]
    taken = take(batches(name, one, batch=len(one), graph=WHOLE), 1)

    assert np.bincount(one.labels[one.usable]).tolist() == counts
    assert paths[0] == paths[1] != paths[2]
    assert one.fingerprint != other.fingerprint
    assert set(indices(taken)) == set(range(len(one)))


@every_example
def test_the_fingerprint_is_another_when_the_images_are(name, sound, tmp_path, endpoint):
    (first, other, longer) = (tmp_path / each for each in ("first", "other", "longer"))
    for each in (first, other, longer):
        shutil.copytree(sound.source, each / "source")
    reader_examples.files(other / "source")[3].unlink()
    with open(reader_examples.files(longer / "source")[3], "ab") as file:
        file.write(b"more")
    before, _ = sound.listed(name)
    same, fewer, grown = (
        Shelf(each / "source", each / "stored", endpoint).listed(name)[0]
        for each in (first, other, longer)
    )
    of_contents = EXAMPLES[name].reader in ("folder", "tar", "hf")

    assert sound.listed(name)[0].fingerprint == before.fingerprint
    assert sound.listed(name, tmp_path / "cache")[0].fingerprint == before.fingerprint
    assert sound.listed(name, limit=4)[0].fingerprint != before.fingerprint
    assert fewer.fingerprint != before.fingerprint
    if of_contents:  # a list's entries are other ones, as they name another place
        assert same.fingerprint == before.fingerprint
        assert grown.fingerprint != before.fingerprint


@every_example
def test_with_a_cache_the_second_start_finds_the_same(name, damaged, tmp_path):
    first, _ = damaged.listed(name, tmp_path / "cache")
    second, said = damaged.listed(name, tmp_path / "cache")

    assert said == []
    assert first.fingerprint == second.fingerprint
    assert first.written == second.written
    for key in ("height", "width", "labels", "usable"):
        assert np.array_equal(getattr(first, key), getattr(second, key)), key
    assert [first.path(row) for row in range(COUNT)] == [second.path(row) for row in range(COUNT)]


@every_example
def test_a_root_that_is_not_there_is_named_in_one_line(name, sound):
    nowhere = f"{sound.options(name).root}.nowhere"
    with pytest.raises(ValueError, match=r"nowhere") as caught:
        sound.listed(name, root=nowhere)

    assert "\n" not in str(caught.value)


@every_example
def test_an_image_takes_less_than_200_bytes_of_a_process_with_its_place_in_the_order(
    name, tmp_path, endpoint
):
    held = []
    for number, count in enumerate((10, 40)):
        to = tmp_path / str(number)
        source = reader_examples.images(to / "source", counts={"a": count, "b": count}, side=32)
        samples, _ = Shelf(source, to / "stored", endpoint).listed(name, to / "cache")
        contents = sum(file.stat().st_size for file in reader_examples.files(source))
        held.append(bytes_held(samples, contents))

    assert (held[1] - held[0]) / 60 + 16 < 200  # the order: two numbers


def bytes_held(start: Any, contents: int) -> int:
    """Of an object and all that it holds, but for the images themselves, which are mapped.

    Args:
        start: the object.
        contents: bytes of the images, of which an array has a fourth or more.
    """
    seen: set[int] = set()
    pending, total = [start], 0
    skipped = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    while pending:
        each = pending.pop()
        if id(each) in seen or isinstance(each, skipped):
            continue
        seen.add(id(each))
        size = each.nbytes if isinstance(each, np.ndarray) else sys.getsizeof(each)
        total += size if size < contents / 4 else 0
        pending += gc.get_referents(each)
    return total
