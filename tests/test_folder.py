"""The folder reader: a stable listing, bad files named before training, and the DALI source."""

import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from fastssl import loader
from pipelines.readers import folder, scan


def jpeg(height: int = 4, width: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (height % 256, width % 256, 0)).save(file, "JPEG")
    return file.getvalue()


def write(root: Path, *names: str | bytes, content: bytes | None = None) -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(jpeg() if content is None else content)


def listed(
    root: Path | str, cache: Path | None = None, **options
) -> tuple[folder.Samples, list[str]]:
    """The listing of a folder, and the lines that were said."""
    lines: list[str] = []
    given = folder.Options(root=str(root), **options)
    return folder.list_samples(given, cache=cache, say=lines.append), lines


def names(samples: folder.Samples) -> list[str]:
    return [os.path.relpath(samples.path(row), samples.root) for row in range(len(samples))]


def error(root: Path | str, **options) -> str:
    with pytest.raises(ValueError, match=r"^data\.root: ") as caught:
        listed(root, **options)
    return str(caught.value).removeprefix("data.root: ")


# The listing


@pytest.mark.parametrize("seconds", [["val"], ["validation"], ["test"], ["test", "val"]])
def test_splits_are_not_taken_for_classes(tmp_path: Path, seconds: list[str]):
    root, cache = tmp_path / "images", tmp_path / "cache"
    write(root, "train/a/1.jpg", *(f"{name}/a/1.jpg" for name in seconds))
    folders = {1: f"train/ and {seconds[0]}/", 2: "train/, val/ and test/"}[len(seconds)]

    for options in ({}, {"limit": 1}, {"cache": cache}, {"cache": cache}):
        assert error(root, **options) == (
            f"{root} holds {folders}: give one of them, such as {root}/train"
        )


@pytest.mark.parametrize(
    ("others", "classes"),
    [
        ((), ("train",)),
        (("bus/1.jpg", "val/1.jpg"), ("bus", "train", "val")),
        (("bus/1.jpg",), ("bus", "train")),
        (("val/1.jpg", "1.jpg"), ()),
        (("val/README.txt",), ("train",)),
    ],
)
def test_a_class_may_be_called_train(tmp_path: Path, others: tuple[str, ...], classes: tuple):
    write(tmp_path, "train/1.jpg", *others)

    assert listed(tmp_path)[0].classes == classes


def test_rows_are_in_the_order_of_whole_names_whatever_the_folders(tmp_path: Path):
    write(tmp_path, "b/1.jpg", "a/z.jpg", "a.b/1.jpg", "a/b/c/d/1.jpg", "B/1.jpg", "a/b.jpg")

    samples, _ = listed(tmp_path)

    assert names(samples) == sorted(names(samples), key=os.fsencode)
    assert names(samples)[:3] == ["B/1.jpg", "a.b/1.jpg", "a/b.jpg"]
    assert samples.usable.tolist() == [0, 1, 2, 3, 4, 5]


def test_first_level_folders_are_the_classes(tmp_path: Path):
    write(tmp_path, "cat/1.jpg", "cat/2.jpg", "cat.b/1.jpg", "dog/old/1.jpg")
    write(tmp_path, "dog/empty.jpg", "notes/README", "LICENSE", content=b"")

    samples, _ = listed(tmp_path)

    assert samples.classes == ("cat.b", "cat", "dog")
    assert samples.labels is not None
    assert dict(zip(names(samples), samples.labels.tolist(), strict=True)) == {
        "LICENSE": -1,
        "cat.b/1.jpg": 0,
        "cat/1.jpg": 1,
        "cat/2.jpg": 1,
        "dog/empty.jpg": 2,
        "dog/old/1.jpg": 2,
        "notes/README": -1,
    }


@pytest.mark.parametrize("name", ["0.jpg", "b.jpg", "z.jpg"])
def test_an_image_directly_in_the_root_means_no_classes(name: str, tmp_path: Path):
    write(tmp_path, "a/1.jpg", "c/1.jpg", name)

    samples, _ = listed(tmp_path)

    assert samples.classes == ()
    assert samples.labels is None


def test_hidden_files_and_sidecars_are_left_out_and_any_other_name_is_judged_by_content(
    tmp_path: Path,
):
    write(tmp_path, "a/.hidden.jpg", ".cache/1.jpg", "a/labels.TXT", "a/meta.json", "a/page.html")
    write(tmp_path, "a/1.jpg", "a/2", "a/3.mp4", "a/folder.txt/4.JPEG")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")

    samples, lines = listed(tmp_path)

    assert names(samples) == ["a/1.jpg", "a/2", "a/3.mp4", "a/folder.txt/4.JPEG"]
    assert lines == []


def test_dimensions_are_those_of_the_images(tmp_path: Path):
    write(tmp_path, "1.jpg", content=jpeg(30, 50))
    write(tmp_path, "2.jpg", content=b"")
    write(tmp_path, "3.jpg", content=jpeg(7, 9))

    samples, _ = listed(tmp_path)

    assert samples.height.tolist() == [30, 0, 7]
    assert samples.width.tolist() == [50, 0, 9]


def test_links_to_files_and_folders_are_followed(tmp_path: Path):
    write(tmp_path / "elsewhere", "x/1.jpg", "2.jpg")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "file.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "root")

    samples, lines = listed(tmp_path / "link")

    assert names(samples) == ["a/file.jpg", "b/2.jpg", "b/x/1.jpg", "c/2.jpg", "c/x/1.jpg"]
    assert samples.classes == ("a", "b", "c")
    assert lines == []


def test_links_that_lead_back_are_not_followed_and_named(tmp_path: Path):
    write(tmp_path, "a/b/1.jpg")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to(".")

    samples, lines = listed(tmp_path)

    assert names(samples) == ["a/b/1.jpg"]
    assert lines == [
        "data: not following links that lead back to a folder that they lie in: a/b/up, a/self"
    ]
    assert error(tmp_path, bad="error") == (
        f"links in {tmp_path} lead back to a folder that they lie in: a/b/up, a/self; "
        "remove them, or leave them out with data.bad=skip"
    )


def test_links_that_lead_nowhere_are_bad_files(tmp_path: Path):
    write(tmp_path, "1.jpg")
    (tmp_path / "2.jpg").symlink_to("gone.jpg")
    (tmp_path / "3.jpg").symlink_to("3.jpg")

    samples, _ = listed(tmp_path)

    assert samples.bad == {
        1: "cannot be read: No such file or directory",
        2: "cannot be read: Too many levels of symbolic links",
    }


def test_fingerprint_is_of_names_and_sizes_and_not_of_the_place(tmp_path: Path):
    write(tmp_path / "one", "a/1.jpg", "a/2.jpg")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before, _ = listed(tmp_path / "one")
    moved, _ = listed(tmp_path / "two")
    (tmp_path / "two" / "a" / "2.jpg").rename(tmp_path / "two" / "a" / "3.jpg")
    renamed, _ = listed(tmp_path / "two")
    write(tmp_path / "one", "a/2.jpg", content=jpeg() + b"longer")
    grown, _ = listed(tmp_path / "one")

    assert before.fingerprint == moved.fingerprint
    assert len({before.fingerprint, renamed.fingerprint, grown.fingerprint}) == 3


# Bad files


def test_bad_files_keep_their_rows_and_are_named_in_one_line(tmp_path: Path):
    write(tmp_path, "a/1.jpg", "a/4.jpg", "a/6.jpg")
    write(tmp_path, "a/2.jpg", content=b"")
    write(tmp_path, "a/3.jpg", content=b"<html>404</html>")
    write(tmp_path, "a/5.jpg", content=jpeg()[:-40])
    write(tmp_path, "b/7.jpg", content=b"GIF89a\0\0")

    samples, lines = listed(tmp_path)

    cut = f"truncated JPEG: it ends at byte {len(jpeg()) - 40}"
    gif = "GIF file, which is not read: convert it to PNG or JPEG"
    html = "HTML page, not an image: a download that failed?"
    assert len(samples) == 7
    assert samples.usable.tolist() == [0, 3, 5]
    assert samples.bad == {1: "empty file", 2: html, 4: cut, 6: gif}
    assert lines == [
        f"data: skipping 4 of 7 files: a/2.jpg (empty file), a/3.jpg ({html}), a/5.jpg ({cut}), "
        f"b/7.jpg ({gif}) (data.bad=error refuses them)"
    ]


def test_bad_files_are_refused_on_request_and_the_first_five_are_named(tmp_path: Path):
    write(tmp_path, "0.jpg")
    write(tmp_path, *[f"{k}.jpg" for k in range(1, 8)], content=b"")

    first = ", ".join(f"{k}.jpg (empty file)" for k in range(1, 6))
    assert error(tmp_path, bad="error") == (
        f"7 of 8 files in {tmp_path} cannot be used: {first} and 2 more; "
        "remove them, or leave them out with data.bad=skip"
    )


def test_images_of_too_many_pixels_are_bad_and_the_limit_can_be_moved(tmp_path: Path):
    write(tmp_path, "1.jpg", content=jpeg(100, 100))
    write(tmp_path, "2.jpg", content=jpeg(101, 100))
    bomb = jpeg().replace(b"\0\4\0\6", b"\xea\x60\xea\x60", 1)  # 60,000 x 60,000 in 600 bytes
    write(tmp_path, "3.jpg", content=bomb)

    default, _ = listed(tmp_path, tmp_path / "cache")
    strict, _ = listed(tmp_path, tmp_path / "cache", max_pixels=10_000)
    lenient, _ = listed(tmp_path, tmp_path / "cache", max_pixels=10**10)

    assert default.bad == {2: "60,000 x 60,000 pixels, over data.max_pixels=178,956,970"}
    assert strict.bad[1] == "100 x 101 pixels, over data.max_pixels=10,000"
    assert lenient.bad == {}


def test_file_names_may_hold_any_bytes_and_are_shown_on_one_line(tmp_path: Path):
    odd = [b"a b/new\nline.jpg", b"a b/\xff\xfe.jpg", "a b/\u00e9t\u00e9.jpg".encode()]
    write(tmp_path, *odd)
    write(tmp_path, b"a b/bad\n\xff.jpg", content=b"")

    samples, lines = listed(tmp_path)

    assert [os.fsencode(name) for name in names(samples)] == sorted([*odd, b"a b/bad\n\xff.jpg"])
    assert [os.path.exists(samples.path(row)) for row in range(4)] == [True] * 4
    assert lines == [
        "data: skipping 1 of 4 files: 'a b/bad\\n\\udcff.jpg' (empty file) "
        "(data.bad=error refuses them)"
    ]


# Bad roots


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    assert error(tmp_path / "no" / "such") == (
        f"there is no folder {tmp_path}/no/such, only {tmp_path}"
    )


def test_a_url_is_an_error_that_names_the_readers_for_it():
    said = (
        "s3:// is no folder: an object store (s3://) is read with data.use=pipelines.readers.tar or"
        " pipelines.readers.list"
    )

    assert error("s3://bucket/images") == said


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path):
    write(tmp_path, "1.jpg")

    assert error(tmp_path / "1.jpg") == (
        f"{tmp_path}/1.jpg is a file: give the folder that holds the images"
    )


def test_no_images_is_an_error_that_counts_what_was_left_out(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty") == f"no images in {tmp_path}/empty: found 0 files"

    write(tmp_path, "labels.txt", ".hidden.jpg")
    assert error(tmp_path) == (
        f"no images in {tmp_path}: found 0 files "
        "(+ 2 left out: hidden, or named as no image is, such as *.txt)"
    )

    write(tmp_path, "1.jpg", "2.jpg", content=b"")
    assert error(tmp_path) == (
        f"no images in {tmp_path}: none of 2 files "
        "(+ 2 left out: hidden, or named as no image is, such as *.txt) is one: "
        "1.jpg (empty file), 2.jpg (empty file)"
    )


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root reads everything, whatever the permissions: become nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:  # EINVAL in a container whose root is the only user
        pytest.skip("there is no other user than root")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, which those of pytest are not."""
    with ExitStack() as until_the_end:
        for place in (None, "/tmp"):  # $TMPDIR may lie below a folder of root's own
            path = until_the_end.enter_context(tempfile.TemporaryDirectory(dir=place))
            os.chmod(path, 0o755)
            with as_ordinary_user():
                entered = os.path.exists(path)
            if entered:
                yield Path(path)
                return
        pytest.skip("no folder for temporary files is open to every user")


def test_folders_and_files_that_must_not_be_read_are_named(open_folder: Path):
    write(open_folder, "in/a/1.jpg", "in/b/2.jpg", "in/b/3.jpg")

    (open_folder / "in" / "b" / "2.jpg").chmod(0)
    with as_ordinary_user():
        samples, _ = listed(open_folder / "in")
    (open_folder / "in" / "b").chmod(0)
    with as_ordinary_user():
        user = os.geteuid()
        inner = error(open_folder / "in")
    (open_folder / "in").chmod(0)
    with as_ordinary_user():
        itself = error(open_folder / "in")
        inside = error(open_folder / "in" / "a")
    (open_folder / "in").chmod(0o755)
    (open_folder / "in" / "b").chmod(0o755)

    why = f"as user {user}: Permission denied"
    assert samples.bad == {1: "cannot be read: Permission denied"}
    assert inner == f"cannot read the folder {open_folder}/in/b/ {why}"
    assert itself == f"cannot read the folder {open_folder}/in/ {why}"
    assert inside == f"cannot read the folder {open_folder}/in/a {why}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": ""}, "root must name a folder with images"),
        ({"root": "a", "bad": "ignore"}, "bad ('ignore') must be 'skip' or 'error'"),
        ({"root": "a", "max_pixels": 0}, "max_pixels (0) must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        folder.Options(**options)


# The cache


def same_listing(one: folder.Samples, other: folder.Samples) -> bool:
    return (
        names(one) == names(other)
        and one.bad == other.bad
        and one.fingerprint == other.fingerprint
        and np.array_equal(one.height, other.height)
        and np.array_equal(one.width, other.width)
        and np.array_equal(one.usable, other.usable)
    )


def spoil(path: Path) -> None:
    """Change a file and nothing that the listing could tell it by."""
    status = path.stat()
    path.write_bytes(b"?" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_next_start_reads_the_headers_of_new_and_changed_files_alone(tmp_path: Path):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root, "a/1.jpg", "b/2.jpg", "c/3.jpg", "d/4.jpg")
    write(root, "c/bad.jpg", content=b"")
    first, _ = listed(root, cache)
    spoil(root / "a" / "1.jpg")
    again, _ = listed(root, cache)
    write(root, "a/0.jpg", "c/new.jpg", "z/9.jpg", content=jpeg(8, 8))
    write(root, "c/3.jpg", content=jpeg(5, 5))
    (root / "b" / "2.jpg").unlink()
    changed, _ = listed(root, cache)
    spoil(root / "z" / "9.jpg")
    after, _ = listed(root, cache)
    without, _ = listed(root)

    assert same_listing(first, again)
    assert names(changed) == [
        *("a/0.jpg", "a/1.jpg", "c/3.jpg", "c/bad.jpg", "c/new.jpg", "d/4.jpg", "z/9.jpg")
    ]
    assert changed.height.tolist() == [8, 4, 5, 0, 8, 4, 8]
    assert same_listing(changed, after)
    assert without.bad.keys() == {1, 3, 6}


def test_a_bad_file_that_is_repaired_is_found_good(open_folder: Path):
    write(open_folder, "in/1.jpg", "in/2.jpg")
    (open_folder / "in" / "2.jpg").chmod(0)
    cache = open_folder / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with as_ordinary_user():
        before, _ = listed(open_folder / "in", cache)
    (open_folder / "in" / "2.jpg").chmod(0o644)
    after, _ = listed(open_folder / "in", cache)

    assert before.usable.tolist() == [0]
    assert after.usable.tolist() == [0, 1]


def test_each_folder_has_its_own_cache_whatever_path_leads_to_it(tmp_path: Path):
    write(tmp_path, "one/1.jpg", "two/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "one")

    for name in ("one", "two", "link"):
        listed(tmp_path / name, tmp_path / "cache")

    assert len(list((tmp_path / "cache" / "listings").iterdir())) == 2


def test_damage_anywhere_in_the_cache_is_said_and_mended(tmp_path: Path):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root, "1.jpg", "2.jpg")
    whole, _ = listed(root, cache)
    (path,) = (cache / "listings").iterdir()
    content = path.read_bytes()
    flipped = [
        content[:where] + bytes([content[where] ^ 0x10]) + content[where + 1 :]
        for where in range(0, len(content), 97)
    ]
    line = f"data: {path} is damaged or of another version; making it again"

    assert len(flipped) > 20
    for damaged in [b"", content[:31], content[:-1], content + b"\0", *flipped]:
        (tmp_path / "damaged").write_bytes(damaged)
        (tmp_path / "damaged").replace(path)  # not in place: the listing of before is mapped
        samples, lines = listed(root, cache)

        assert lines == [line]
        assert same_listing(samples, whole)
        assert listed(root, cache)[1] == []


def test_a_cache_that_cannot_be_written_or_read_is_said_and_done_without(tmp_path: Path):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write(root, "1.jpg")
    cache.write_bytes(b"a file in its place")
    samples, lines = listed(root, cache)
    cache.unlink()
    listed(root, cache)
    (path,) = (cache / "listings").iterdir()
    path.unlink()
    path.mkdir()
    unread, both = listed(root, cache)

    assert samples.usable.tolist() == unread.usable.tolist() == [0]
    assert lines == [
        f"data: cannot read {path} (Not a directory); making it again",
        f"data: cannot write {path}: Not a directory; the next start does it all again",
    ]
    assert both == [
        f"data: cannot read {path} (Is a directory); making it again",
        f"data: cannot write {path}: Is a directory; the next start does it all again",
    ]
    assert list(path.parent.iterdir()) == [path]


def test_long_listings_and_scans_say_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, "0.jpg")
    for k in range(1, 1100):
        os.link(tmp_path / "0.jpg", tmp_path / f"{k}.jpg")
    monkeypatch.setattr(scan, "PROGRESS_SECONDS", 0)

    _, lines = listed(tmp_path)

    assert lines[:2] == ["data: listed 1,000 files", "data: listed 1,100 files"]
    assert lines[-1] == "data: scanned 1,100 of 1,100 headers"


# The source

MakePipeline = Callable[..., Pipeline]


@pytest.fixture
def make_pipeline() -> MakePipeline:
    def make(
        samples: folder.Samples,
        rows: Callable[[int], np.ndarray],
        prefetch: int = 2,
        checkpoint: bytes | None = None,
    ) -> Pipeline:
        pipeline = Pipeline(
            batch_size=4,
            num_threads=1,
            device_id=None,  # pyright: ignore[reportArgumentType]  None: no GPU
            seed=1,
            prefetch_queue_depth=prefetch,
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        with pipeline:
            image, index = folder.source(samples, rows, loader.Options())
            drawn = fn.random.uniform(range=[0.0, 1.0])
            pipeline.set_outputs(image.data, index, drawn)
        pipeline.build()
        return pipeline

    return make


def batch(pipeline: Pipeline) -> tuple[list[bytes], list[int], list[float]]:
    encoded, index, drawn = pipeline.run()
    return (
        [bytes(np.array(encoded.at(k))) for k in range(len(encoded))],
        index.as_cpu().as_array().ravel().tolist(),
        drawn.as_cpu().as_array().ravel().tolist(),
    )


def test_source_gives_the_bytes_of_the_rows_asked_for(tmp_path: Path, make_pipeline: MakePipeline):
    for k, name in enumerate([b"a/1.jpg", b"a/\xff\n .jpg", b"b/3.jpg"]):
        write(tmp_path, name, content=jpeg(k + 1, 9))
    write(tmp_path, "a/2.jpg", content=b"")
    samples, _ = listed(tmp_path)
    asked = [[3, 0], [2, 2, 0, 3], [0]]

    def rows(step: int) -> np.ndarray:
        if step == len(asked):
            raise StopIteration
        return np.array(asked[step])

    pipeline = make_pipeline(samples, rows)
    for expected in asked:
        encoded, index, _ = batch(pipeline)

        assert index == expected
        assert encoded == [Path(samples.path(row)).read_bytes() for row in expected]
    with pytest.raises(StopIteration):
        batch(pipeline)


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_source_goes_on_after_the_last_batch_delivered_when_restored_from_a_checkpoint(
    prefetch: int, tmp_path: Path, make_pipeline: MakePipeline
):
    write(tmp_path, *[f"{k}.jpg" for k in range(9)])
    samples, _ = listed(tmp_path)

    def rows(step: int) -> np.ndarray:
        return np.array([step % 9, (step + 4) % 9])

    whole = make_pipeline(samples, rows, prefetch)
    expected = [batch(whole) for _ in range(8)]
    stopped = make_pipeline(samples, rows, prefetch)
    for step in range(3):
        assert batch(stopped) == expected[step]
    restored = make_pipeline(samples, rows, prefetch, stopped.checkpoint())

    assert [batch(restored) for _ in range(5)] == expected[3:]
    assert len({tuple(drawn) for _, _, drawn in expected}) == 8


def test_a_file_that_vanishes_during_a_run_is_named(tmp_path: Path, make_pipeline: MakePipeline):
    write(tmp_path, "1.jpg", "2.jpg")
    samples, _ = listed(tmp_path)
    (tmp_path / "2.jpg").unlink()
    pipeline = make_pipeline(samples, lambda step: samples.usable)

    with pytest.raises(RuntimeError, match=re.escape(f"Could not open file {tmp_path}/2.jpg")):
        pipeline.run()


def test_a_limit_takes_evenly_spaced_images_and_counts_rows_among_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", (20 + number, 30)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "a" / "5.png").write_bytes(b"")
    options = folder.Options(root=str(tmp_path), limit=4)
    samples = folder.list_samples(options, cache=None, say=lambda _: None)

    assert [samples.path(row)[-7:] for row in range(4)] == [
        "a/0.png",
        "a/7.png",
        "b/3.png",
        "b/9.png",
    ]
    assert list(samples.usable) == [0, 1, 2, 3]
    assert list(samples.width) == [20, 27, 23, 29]
    assert samples.labels is not None
    assert list(samples.labels) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"limit \(0\) must be at least 1"):
        folder.Options(root=str(tmp_path), limit=0)
