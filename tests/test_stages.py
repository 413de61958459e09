"""`python -m benchmarks stages`: each stage alone, and a sentence that says which one binds."""

import io
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as suite
from benchmarks import binding, decode_limit, result, same_files, stages, step
from benchmarks.binding import Setting
from benchmarks.method import Measured
from fastssl import config
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
            "The loader binds (G 750 images/s, L 250): of the cores' time it takes 75%; more cores,"
            " or smaller crops and fewer changes of colour, would move it.",
        ),
        (
            {"step": 1000.0, "decode": 280.0},
            GPU,
            "The loader binds (G 1,000 images/s, L 250): the GPU waits 75% of the time; a packed"
            " store (python -m fastssl.data pack), more cores, or other settings of the decoder"
            " (python -m benchmarks tune) would move it.",
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
            "The loader binds (G 1,000 images/s, L 250): the GPU waits 75% of the time; faster"
            " storage, or a packed store (python -m fastssl.data pack), would move it.",
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

    assert "8 ms of CPU in the loader: reading 1%, decoding 26%, the rest of the graph 72%" in said
    assert "2.0 of 2 cores are busy; were decoding free, L would be 339" in said
    assert "decoding reaches 0.90 of it, the loader 0.25" in said
    assert "1 / (1/L + 1/G) = 2.48 is to be expected, of which it is 1.00 (stall 1.0%" in said
    assert "takes 40% of its speed (G is then 1.5 images/s)" in said
    assert "L is 0.99 of the bare graph's pipe.run()" in said


def test_a_graph_that_decodes_a_part_of_each_image_may_be_faster_than_decoding_whole_ones():
    part = stages_of() | {"loader": seen(1200.0, cpu_ms=1.6)}
    said = binding.conclusions(part, CPU)

    assert "the graph decodes only the part that its crop needs" in said[1]


def test_a_disk_slower_than_the_loader_is_told():
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

    def fits_none(batch: dict[str, torch.Tensor]) -> None:
        raise torch.OutOfMemoryError

    two, seconds = step.fitting(slow, draw, 100, seconds=0.01)
    all_of_them, _ = step.fitting(lambda batch: None, draw, 100, seconds=1.0)
    eight, _ = step.fitting(fits_eight, draw, 8 * 2**5, seconds=100.0)

    assert (len(two["image"]), seconds >= 0.02) == (2, True)
    assert len(all_of_them["image"]) == 100
    assert len(eight["image"]) == 8
    with pytest.raises(ValueError, match="a step of 2 images does not fit the GPU's memory"):
        step.fitting(fits_none, draw, 100, seconds=1.0)


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
    assert set(rows) - {"read_cold", "interference"} == {
        *("read", "decode", "decode_limit", "graph", "loader", "step", "end_to_end")
    }
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
