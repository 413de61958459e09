"""`python -m benchmarks stages`: each stage alone, and a sentence that says which one binds."""

import io
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as suite
from benchmarks import binding, compare, decode_limit, result, same_files, stages, step
from benchmarks.binding import Setting
from benchmarks.method import Measured
from fastssl import config, data
from fastssl.loader import Options

CPU = Setting(gpu=False, threads=2, cores=2, limit="simplejpeg")
GPU = Setting(gpu=True, threads=8, cores=8, limit="simplejpeg")


def seen(*rates: float, cpu_ms: float = 1.0) -> Measured:
    return Measured(list(rates), [cpu_ms] * len(rates), {"p50": 1.0, "p95": 1.0, "p99": 1.0}, 9)


def stages_of(**rates: float) -> dict[str, Measured]:
    """One repeat of every stage, at rates that fit together unless told otherwise."""
    usual = {"read": 20_000.0, "decode": 900.0, "graph": 252.0, "loader": 250.0, "step": 2.5}
    usual |= {"decode_limit": 1000.0, "end_to_end": 2.475, "interference": 1.5}
    cpu = {"read": 0.1, "decode": 2.2, "loader": 8.0}
    both = usual | rates
    return {name: seen(rate, cpu_ms=cpu.get(name, 1.0)) for name, rate in both.items()}


@pytest.mark.parametrize(
    ("rates", "where", "sentence"),
    [
        (
            {},
            CPU,
            "The step binds (G 2.5 images/s, L 250): the loader has 100 times to spare; a GPU or a"
            " smaller network would move it, a faster loader by no more than its part of the cores'"
            " time, 1.0%.",
        ),
        (
            {"step": 750.0},
            CPU,
            "The loader binds (G 750 images/s, L 250): of the cores' time it takes 75%; more cores"
            " or smaller crops and fewer changes of colour would move it.",
        ),
        (
            {"step": 8000.0, "loader": 800.0},
            GPU,
            "The loader binds (G 8,000 images/s, L 800): the GPU waits 90% of the time; a store of"
            " smaller images (python -m fastssl.data pack --short-side 292), more cores or other"
            " settings of the decoder (python -m benchmarks tune) would move it.",
        ),
        (
            {"step": 100.0},
            GPU,
            "The step binds (G 100 images/s, L 250): the loader has 2.5 times to spare; a faster"
            " GPU, a smaller network or a lower precision would move it, a faster loader would"
            " not.",
        ),
        (
            {"step": 1000.0, "read": 300.0},
            GPU,
            "The loader binds (G 1,000 images/s, L 250): the GPU waits 75% of the time; a tar"
            " store in place of reading file by file from the page cache"
            " (python -m fastssl.data pack) would move it.",
        ),
    ],
)
def test_it_says_which_stage_binds_and_what_would_move_it(rates, where, sentence):
    first, *_ = binding.conclusions(stages_of(**rates), where)

    assert first == sentence


def test_a_loader_as_fast_as_the_step_does_not_bind_alone():
    first, *_ = binding.conclusions(stages_of(step=260.0), GPU)

    assert first.startswith("Loader and step are even (G 260 images/s, L 250)")


def test_a_loader_with_fewer_threads_than_cores_is_told_of_the_others():
    few = Setting(gpu=False, threads=1, cores=2)
    first, *_ = binding.conclusions(stages_of(step=750.0), few)

    assert "all 2 cores in place of 1 thread (loader.threads)" in first


@pytest.mark.parametrize("where", [CPU, GPU])
def test_stored_pixels_are_not_told_to_be_packed_and_warm_reading_not_to_need_storage(where):
    slow = {"step": 5000.0, "read": 300.0, "decode": 300.0}
    files, *_ = binding.conclusions(stages_of(**slow), where)
    stored, *_ = binding.conclusions(stages_of(**slow), replace(where, together=True))
    pixels, *_ = binding.conclusions(stages_of(**slow), replace(where, pixels=True, together=True))

    assert "storage" not in files + stored + pixels
    assert "reading file by file from the page cache (python -m fastssl.data pack)" in files
    assert "file by file" not in stored
    assert "pack" not in pixels


def test_a_gpu_whose_cores_have_time_left_needs_no_more_of_them():
    idle, *_ = binding.conclusions(stages_of(step=1000.0), GPU)
    busy, *_ = binding.conclusions(stages_of(step=8000.0, loader=740.0, decode=2000.0), GPU)

    assert "cores or" not in idle
    assert "changes of colour (the GPU's part binds: 2.0 of 8 cores are busy) would" in idle
    assert "more cores or smaller crops and fewer changes of colour would move it" in busy


def test_what_the_decoder_is_already_is_no_advice():
    slow = stages_of(step=8000.0, loader=800.0, interference=4000.0)
    auto = "\n".join(binding.conclusions(slow, GPU))
    cpu = "\n".join(binding.conclusions(slow, replace(GPU, decoder="cpu")))
    pixels = "\n".join(binding.conclusions(slow, replace(GPU, pixels=True)))

    assert "loader.decoder=cpu would take decoding off it" in auto
    assert "loader.decoder=cpu" not in cpu + pixels
    assert "decoding on the GPU (loader.decoder=auto) would move it" in cpu
    assert "loader.decoder" not in pixels


def test_on_a_gpu_the_decode_limit_is_one_of_the_cpu():
    on_cpu = "\n".join(binding.conclusions(stages_of(), replace(CPU, threads=1)))
    on_gpu = "\n".join(binding.conclusions(stages_of(), GPU))

    assert "The decode limit of this machine is 1,000 images/s" in on_cpu
    assert "(libjpeg-turbo by simplejpeg, 2 threads, whole images from memory):" in on_cpu
    assert "The CPU decode limit of this machine is 1,000 images/s" in on_gpu
    assert "whole images from memory; a GPU's decoders may pass it):" in on_gpu


def test_on_a_cpu_the_times_of_loader_and_step_add_up_and_on_a_gpu_they_overlap():
    alone = stages_of(loader=100.0, step=100.0, end_to_end=50.0)

    assert binding.derived(alone, gpu=False)["expected"] == [pytest.approx(50.0)]
    assert binding.derived(alone, gpu=False)["loop_to_expected"] == [pytest.approx(1.0)]
    assert binding.derived(alone, gpu=True)["expected"] == [100.0]
    assert binding.derived(alone, gpu=True)["stall"] == [0.5]
    assert binding.derived(alone, gpu=True)["overlap"] == [0.5]


def test_ratios_are_taken_within_a_repeat():
    rates = {"read": (9.0, 9.0), "decode": (8.0, 4.0), "graph": (4.0, 2.0), "loader": (4.0, 1.0)}
    rates |= {"step": (2.0, 1.0), "end_to_end": (1.0, 1.0), "decode_limit": (8.0, 8.0)}
    found = binding.derived({name: seen(*each) for name, each in rates.items()}, gpu=True)

    assert found["loader_to_graph"] == [1.0, 0.5]
    assert found["decode_to_limit"] == [1.0, 0.5]
    assert found["stall"] == [0.5, 0.0]
    assert "interference" not in found


def test_the_sentences_carry_the_limit_the_loop_and_what_the_loader_s_time_goes_to():
    said = "\n".join(binding.conclusions(stages_of(), CPU))

    assert "8 ms of CPU in the loader: reading 1%, decoding 26%, the rest of the graph 73%" in said
    assert "2.0 of 2 cores are busy; were decoding free, L would be 339" in said
    assert "decoding reaches 0.90 of it, the loader 0.25" in said
    assert "1 / (1/L + 1/G) = 2.48 is to be expected, of which it is 1.00 (stall 1.0%" in said
    assert "takes 40% of its speed (G is then 1.5 images/s)" in said
    assert "L is 0.99 of the bare graph's pipe.run()" in said


def test_where_only_the_crop_is_decoded_no_share_and_no_bound_of_decoding_is_told():
    for loader in (seen(250.0, cpu_ms=8.0), seen(1200.0, cpu_ms=1.6)):
        part = stages_of() | {"loader": loader}
        said = binding.conclusions(part, replace(CPU, region=True))[1]
        on_gpu = binding.conclusions(part, replace(GPU, region=True))[1]

        assert "only what the crop needs is decoded" in said
        assert "(whole images, alone: 2.2 ms)" in said
        assert "decoding free" not in said
        assert "decoding 2" not in said
        assert "decode is of whole images, where the graph decodes only its crop" in on_gpu


def test_shares_add_up_though_decoding_alone_took_longer_than_the_loader():
    said = binding.conclusions(stages_of() | {"loader": seen(1000.0, cpu_ms=2.0)}, CPU)[1]

    assert "reading 5%, decoding 95%, the rest of the graph 0%; 2.0 of 2 cores are busy (" in said


def test_a_store_of_pixels_has_neither_decoding_nor_a_share_of_reading():
    stored = {name: each for name, each in stages_of().items() if "decode" not in name}
    said = binding.conclusions(stored, replace(CPU, pixels=True, together=True))

    assert "8 ms of CPU in the loader, the graph's alone: pixels are stored" in said[1]
    assert not any("decode limit" in sentence for sentence in said)


def test_a_disk_slower_than_the_loader_is_told():
    assert "faster storage would move it" in binding.cold([100.0], [250.0])
    assert "storage binds the loader" in binding.cold([100.0, 90.0, 95.0], [250.0])
    assert "4.0 times what the loader takes" in binding.cold([1000.0], [250.0])


def encoded(mode: str = "RGB", form: str = "JPEG", **options: object) -> bytes:
    ramp = np.mgrid[0:48, 0:64].sum(axis=0).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).convert(mode).save(file, form, **options)
    return file.getvalue()


def test_a_jpeg_s_bytes_tell_subsampling_and_whether_it_is_progressive():
    Jpeg = decode_limit.Jpeg

    assert decode_limit.jpeg(encoded(subsampling=0)) == Jpeg(False, "4:4:4")
    assert decode_limit.jpeg(encoded(subsampling=1)) == Jpeg(False, "4:2:2")
    assert decode_limit.jpeg(encoded(subsampling=2, progressive=True)) == Jpeg(True, "4:2:0")
    assert decode_limit.jpeg(encoded("L")) == Jpeg(False, "gray")
    assert decode_limit.jpeg(encoded("CMYK")) == Jpeg(False, "other")
    assert decode_limit.jpeg(encoded(form="PNG")) is None
    assert decode_limit.jpeg(encoded()[:20]) is None


def test_the_decode_limit_decodes_every_jpeg_and_leaves_other_files_out():
    found = decode_limit.decoder()
    assert found is not None, decode_limit.REMEDY
    name, decode = found
    contents = [encoded(quality=quality) for quality in range(60, 95, 5)]
    mixed = [encoded(form="PNG"), *contents, encoded("CMYK"), encoded()[:300], b""]
    left = decode_limit.decodable(mixed, decode, threads=2)
    decoded: list[bytes] = []

    def note(content: bytes) -> object:
        decoded.append(content)
        return decode(content)

    limit = decode_limit.contender(left, note, batch=8, threads=2)
    done = sum(limit.run() for _ in range(6))
    assert limit.close is not None
    limit.close()

    assert name in ("simplejpeg", "PyTurboJPEG")
    assert set(contents) <= set(left)
    assert len(left) <= len(contents) + 1  # libjpeg fills up what was cut off
    assert set(decoded) == set(left)
    assert len(decoded) >= done >= 6 * 7


def test_a_step_takes_as_many_images_as_its_seconds_allow():
    def draw(images: int) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(images)}

    def slow(batch: dict[str, torch.Tensor]) -> None:
        time.sleep(0.02)

    def fits_eight(batch: dict[str, torch.Tensor]) -> None:
        if len(batch["image"]) > 8:
            raise torch.OutOfMemoryError

    def fits_eight_of_dali_s(images: int) -> dict[str, torch.Tensor]:
        if images > 8:
            raise RuntimeError(
                "CUDA allocation failed\nCan't allocate 805306368 bytes on device 0."
            )
        return draw(images)

    def broken(images: int) -> dict[str, torch.Tensor]:
        raise RuntimeError("Assert on 'axis < 3' failed")

    def fits_none(batch: dict[str, torch.Tensor]) -> None:
        raise torch.OutOfMemoryError

    two, seconds = step.fitting(slow, draw, 100, seconds=0.01)
    all_of_them, _ = step.fitting(lambda batch: None, draw, 100, seconds=1.0)
    eight, _ = step.fitting(fits_eight, draw, 8 * 2**5, seconds=100.0)
    of_dali, _ = step.fitting(lambda batch: None, fits_eight_of_dali_s, 8 * 2**5, seconds=100.0)

    assert (len(two["image"]), seconds >= 0.02) == (2, True)
    assert len(all_of_them["image"]) == 100
    assert len(eight["image"]) == len(of_dali["image"]) == 8
    with pytest.raises(ValueError, match="a step of 2 images does not fit the GPU's memory"):
        step.fitting(fits_none, draw, 100, seconds=1.0)
    with pytest.raises(RuntimeError, match="axis < 3"):
        step.fitting(fits_none, broken, 100, seconds=1.0)


def test_batches_are_drawn_beside_a_step_and_at_no_other_time():
    drawn = threading.Semaphore(0)
    told: list[str] = []

    def draw() -> int:
        time.sleep(0.001)
        told.append("drawn")
        drawn.release()
        return 1

    def run() -> int:
        assert drawn.acquire(timeout=10)
        assert drawn.acquire(timeout=10)
        return 3

    unconsumed = stages._Unconsumed(draw, torch.device("cpu"))
    before = len(told)
    images = unconsumed.beside(run)
    unconsumed.close()
    after = len(told)
    time.sleep(0.02)

    assert (before, images) == (0, 3)
    assert len(told) == after >= 2


def test_what_fails_in_the_drawing_thread_is_told():
    failed = threading.Event()

    def draw() -> int:
        failed.set()
        raise ValueError("no images left")

    unconsumed = stages._Unconsumed(draw, torch.device("cpu"))
    unconsumed.beside(lambda: int(failed.wait(10)))
    unconsumed.close()  # the thread has ended
    with pytest.raises(ValueError, match="no images left"):
        unconsumed.beside(lambda: 1)


@pytest.fixture
def damaged(tmp_path):
    """Twelve images, one of them a PNG, and one that is damaged behind its header."""
    for number in range(11):
        (tmp_path / f"{number:02}.jpg").write_bytes(encoded(quality=70 + number))
    (tmp_path / "11.png").write_bytes(encoded(form="PNG"))
    content = bytearray(encoded(form="PNG"))
    content[60:-20] = bytes(len(content) - 80)
    (tmp_path / "12.png").write_bytes(content)
    return tmp_path


def test_all_stages_go_over_the_same_files_without_the_damaged_one(damaged, checkout):
    recipe = config.load(checkout / "recipes" / "rotation.yaml", [f"data.root={damaged}"])
    samples = recipe.data.module.list_samples(recipe.data.options, cache=None, say=print)
    said: list[str] = []
    loading = Options(threads=1)
    files = same_files.choose(recipe, samples, loading, said.append)
    cpu = torch.device("cpu")
    pipeline = same_files.pipeline(files, same_files.read, loading, batch=4, device=cpu)
    read = []
    for _ in range(3):
        contents, rows = pipeline.run()
        for place in range(4):
            row = int(np.asarray(rows.at(place))[0])
            read.append(row)
            with open(samples.path(row), "rb") as file:
                assert np.asarray(contents.at(place)).tobytes() == file.read()
    cold = same_files.cold_rates(files, loading, batch=4, repeats=2, seconds=1.0)

    assert len(samples.usable) == 13
    assert sorted(read) == files.rows.tolist() == list(range(12))
    assert any("12.png" in line for line in said)
    assert len(files.contents) == files.facts["images"] == 12
    assert files.facts["jpeg"] == pytest.approx(11 / 12)
    assert files.facts["megapixels"] == pytest.approx(48 * 64 / 1e6)
    assert files.facts["bytes"] == pytest.approx(
        np.mean([os.path.getsize(samples.path(row)) for row in range(12)])
    )
    assert cold[0] > 0 if isinstance(cold, list) else cold.startswith("read_cold is left out")


def test_the_command_runs_in_seconds_and_writes_what_it_printed(environ, checkout, tmp_path):
    out = tmp_path / "stages.json"
    command = [sys.executable, "-m", "benchmarks", "stages", "recipes/pirl_jigsaw.yaml"]
    small = [
        "data.limit=24",
        "train.batch=8",
        "backbone.width=8",
        "--quick",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, *small], env=environ, cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = result.read(out)
    rows = {row.name: row for row in written.rows}

    assert written.benchmark == "stages"
    assert set(rows) - {"read_cold", "interference", "gpu_memory"} == {
        *("read", "decode", "decode_limit", "graph", "loader", "step", "end_to_end"),
        *("listing", "first_batch"),
    }
    assert (rows["first_batch"].unit, rows["first_batch"].extra) == ("s", {"batch": 8})
    for row in written.rows:
        batches = row.extra.get("batches")
        assert isinstance(batches, int) or not row.step_ms
        assert not row.step_ms or ("p99" in row.step_ms) == (int(batches or 0) >= 100)
    assert all(len(row.values) == 1 and row.values[0] > 0 for row in written.rows)
    assert rows["loader"].extra["batch"] == 8
    assert rows["loader"].extra["patches/s"] == pytest.approx(9 * rows["loader"].values[0])
    assert rows["loader"].extra["views/s"] == pytest.approx(rows["loader"].values[0])
    assert rows["end_to_end"].extra["expected"] == pytest.approx(
        1 / (1 / rows["loader"].values[0] + 1 / rows["step"].values[0])
    )
    of_images = written.settings["images"]
    assert isinstance(of_images, dict)
    assert of_images["images"] == 24
    assert "binds (G " in written.conclusions[0] or "are even (G " in written.conclusions[0]
    assert all(sentence in done.stdout for sentence in written.conclusions)
    assert "the built-in images and the recipe's demo section are used" in done.stdout
    assert "Warning" not in done.stderr


def test_views_and_patches_are_told_apart_by_what_they_are(checkout):
    exemplar = config.load(checkout / "recipes" / "exemplar.yaml", ["data.root=/nowhere"])
    rotation = config.load(checkout / "recipes" / "rotation.yaml", ["data.root=/nowhere"])
    slanted = config.load(
        checkout / "recipes" / "rotation.yaml", ["data.root=/nowhere", "pipeline.turns=[0, 45]"]
    )
    both = config.load(checkout / "recipes" / "pirl_jigsaw.yaml", ["data.root=/nowhere"])
    few = {"index": torch.zeros(2)}

    assert stages._frames(exemplar, few | {"views": torch.zeros(2, 8, 3, 5, 5)}) == (8, 0)
    assert stages._frames(rotation, few | {"turned": torch.zeros(2, 4, 3, 5, 5)}) == (4, 0)
    assert stages._frames(slanted, few | {"turned": torch.zeros(2, 2, 3, 5, 5)}) == (2, 0)
    image = {"image": torch.zeros(2, 3, 9, 9)}
    assert stages._frames(both, few | image | {"patches": torch.zeros(2, 9, 3, 5, 5)}) == (1, 9)


@pytest.mark.parametrize(
    ("name", "override", "asks"),
    [
        ("rotation", "pipeline.image_size=32", True),
        ("rotation", "loader.region=false", False),
        ("jigsaw", "train.epochs=2", True),
        ("exemplar", "pipeline.size=32", False),
    ],
)
def test_it_is_known_which_graphs_decode_only_their_crop(damaged, checkout, name, override, asks):
    path = checkout / "recipes" / f"{name}.yaml"
    recipe = config.load(path, [f"data.root={damaged}", override])
    samples = recipe.data.module.list_samples(recipe.data.options, cache=None, say=print)

    assert same_files.decodes_region(recipe, samples, recipe.loader) is asks


def test_images_that_were_not_held_are_not_called_no_jpegs(damaged, checkout, monkeypatch):
    recipe = config.load(checkout / "recipes" / "rotation.yaml", [f"data.root={damaged}"])
    samples = recipe.data.module.list_samples(recipe.data.options, cache=None, say=print)
    monkeypatch.setattr(same_files, "MEMORY", 4000)
    files = same_files.choose(recipe, samples, Options(threads=1), lambda _: None)
    held = len(files.contents)
    jpegs = [content for content in files.contents if decode_limit.jpeg(content) is not None]
    said = stages._limit_remarks(files, jpegs, installed=True)
    without_one = stages._limit_remarks(files, jpegs[1:], installed=True)

    assert 0 < held < 12
    assert f"decode_limit takes {held} of the 12 images" in said[0]
    assert len(said) == 1 + (len(jpegs) < held)
    assert f"{held - len(jpegs) + 1} images that are no RGB JPEGs" in without_one[1]


def test_memory_and_seconds_are_rows_that_compare_tells_apart():
    held = {"start": 450.0, "loader": 900.0, "step": 9000.0}
    before = stages._once("pirl", 0.5, 2.0, 64, held)
    after = stages._once("pirl", 0.5, 2.0, 64, held | {"step": 12_000.0})
    made = [result.make("stages", rows, {}) for rows in (before, after)]
    moved = [each for each in compare.compare(made[0], made[1], 0.05) if each.a != each.b]

    assert [row.unit for row in before] == ["s", "s", "MB", "MB", "MB"]
    assert [row.extra.get("stage") for row in before[2:]] == ["start", "loader", "step"]
    assert [(each.key[1], each.unit, each.a, each.b) for each in moved] == [
        ("gpu_memory", "MB", [9000.0], [12_000.0])
    ]


def test_tar_stores_of_both_forms_are_measured_and_no_stage_passes_pointers_only(
    damaged, environ, checkout, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("stores")
    (damaged / "12.png").unlink()
    command = [sys.executable, "-m", "benchmarks", "stages", "recipes/rotation.yaml"]
    small = ["pipeline.image_size=32", "evaluation.resize=40", "evaluation.crop=32"]
    small += ["backbone.name=resnet10", "backbone.width=8", "train.batch=4", "loader.threads=1"]
    small += ["data.use=pipelines.readers.tar", "--quick", "--threads", "2"]
    running = {}
    for form in ("jpeg", "raw"):
        store = folder / form
        packing = ["pack", str(damaged), str(store), "--form", form, "--short-side", "40"]
        assert data.main([*packing, "--workers", "1"]) == 0
        out = ["--out", str(folder / f"{form}.json"), f"data.root={store}"]
        running[form] = subprocess.Popen(
            [*command, *small, *out],
            env=environ,
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    told = {form: process.communicate()[0] for form, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 0], told
    written = {form: result.read(folder / f"{form}.json") for form in running}
    named = {form: {row.name for row in each.rows} for form, each in written.items()}

    assert {"read", "decode", "decode_limit", "graph", "loader"} <= named["jpeg"]
    assert {"read", "graph", "loader", "step", "end_to_end"} <= named["raw"]
    assert not {"decode", "decode_limit", "read_cold"} & named["raw"]
    assert "decode is left out: pixels are stored" in told["raw"]
    for text in told.values():
        assert "read copies the bytes, which the loader does not" in text
        assert "loader.threads=1, as the recipe says: --threads (2) counts where" in text
        assert "read_cold is left out: images lie together in a store" in text
    rows = {row.name: row for row in written["raw"].rows}
    assert rows["loader"].extra["views/s"] == pytest.approx(4 * rows["loader"].values[0])
    assert rows["loader"].extra["patches/s"] == 0


def test_reading_from_a_store_gives_bytes_of_its_own(damaged, checkout, tmp_path_factory):
    (damaged / "12.png").unlink()
    store = tmp_path_factory.mktemp("stores") / "jpeg"
    assert data.main(["pack", str(damaged), str(store), "--workers", "1"]) == 0
    overrides = ["data.use=pipelines.readers.tar", f"data.root={store}"]
    recipe = config.load(checkout / "recipes" / "rotation.yaml", overrides)
    samples = recipe.data.module.list_samples(recipe.data.options, cache=None, say=print)
    loading = Options(threads=1)
    files = same_files.choose(recipe, samples, loading, print)
    cpu = torch.device("cpu")
    body = same_files.reading(files)
    pipeline = same_files.pipeline(files, body, loading, batch=4, device=cpu)
    contents, rows = pipeline.run()
    shards = [(each.ctypes.data, each.ctypes.data + each.nbytes) for each in samples.shards]

    assert files.together
    for place in range(4):
        row = np.asarray(rows.at(place))
        stored = samples.content(row)[0]
        assert np.array_equal(np.asarray(contents.at(place)), stored)
        assert not any(begin <= contents[place].data_ptr() < end for begin, end in shards)


def test_of_an_object_store_no_cold_rate_and_no_sizes_are_told(monkeypatch, checkout, tmp_path):
    class Decoded:
        def __init__(self):
            self.skipped: dict[int, str] = {}

        def __next__(self):
            return {}

    unseen = np.zeros(3, np.uint16)  # sides
    far = SimpleNamespace(
        usable=np.arange(3), height=unseen, width=unseen, path=lambda row: f"s3://bucket/{row}.jpg"
    )
    monkeypatch.setattr(same_files, "Loader", lambda *_, **__: Decoded())
    monkeypatch.setattr(same_files, "_contents", lambda *_: ([b"12", b"3456"], False))
    recipe = config.load(checkout / "recipes" / "rotation.yaml", [f"data.root={tmp_path}"])
    files = same_files.choose(recipe, far, Options(threads=1), print)
    said = same_files.cold_rates(files, Options(threads=1), batch=1, repeats=1, seconds=0.1)

    assert files.remote
    assert not files.together
    assert [files.facts[key] for key in ("width", "height", "megapixels")] == [None] * 3
    assert files.facts["bytes"] == 3
    assert isinstance(said, str)
    assert "read_cold is left out, and the object store itself was not measured" in said
    line = stages._description(recipe, files, torch.device("cpu"), Options(threads=1))
    assert "3 of 3 images: on average pixels not known, 0 kB, 0% JPEG" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/pirl_jigsaw.yaml", "data.root=/nowhere"], "there is no folder /nowhere"),
        (["recipes/pirl_jigsaw.yaml", "pipeline.image_sise=3"], "image_sise"),
        (["recipes/none.yaml"], "recipes/none.yaml"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments, message, capsys, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    code = suite.main(["stages", *arguments, "--quick"])
    told = capsys.readouterr().err

    assert code == 2
    assert message in told
    assert len(told.strip().splitlines()) == 1
