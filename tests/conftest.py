"""What every test may ask for."""

import io
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.shell import ENVIRONMENT

os.environ.clear()  # before torch is imported, which reads some of it
os.environ.update(ENVIRONMENT)

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from PIL import Image

from fastssl import demo, loader
from pipelines.images import Encoded

# A shell script's background jobs, as .ci/run's, ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _seeded_module() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded(_seeded_module: None) -> None:
    """Random weights and images are a test's own, whichever tests a process ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder that holds fastssl/, pipelines/ and recipes/."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_images():
    """The built-in images, rendered: the folder that holds train/ and val/."""
    return demo.render()


@pytest.fixture(scope="session")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment for a process that a test starts, without the user's own settings of
    Accelerate."""
    return {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("huggingface"))}


@pytest.fixture(scope="session")
def run_graph() -> Callable[..., dict[str, np.ndarray]]:
    """Runs a graph on the CPU backend over encoded images: [runs * batch, ...] by output name."""

    def run(module, options, encoded, *, runs=1, seed=0, threads=2, prefetch=2):
        pipeline = Pipeline(
            batch_size=len(encoded),
            num_threads=threads,
            device_id=None,
            seed=seed,
            prefetch_queue_depth=prefetch,
        )
        images = [np.frombuffer(each, np.uint8) for each in encoded]
        rows = [np.array([row], np.int64) for row in range(len(encoded))]
        with pipeline:
            source, index = fn.external_source(
                lambda: (images, rows),
                num_outputs=2,
                dtype=[DALIDataType.UINT8, DALIDataType.INT64],
                ndim=[1, 1],
            )
            outputs = module.graph(Encoded(source, loader.Options()), index, options, "cpu")
            pipeline.set_outputs(*outputs.values())
        batches = [[np.asarray(each.as_tensor()) for each in pipeline.run()] for _ in range(runs)]
        together = [np.concatenate(same) for same in zip(*batches, strict=True)]
        return dict(zip(outputs, together, strict=True))

    return run


@pytest.fixture(scope="session")
def png_of() -> Callable[[np.ndarray], bytes]:
    """Encodes uint8 HWC pixels without loss."""

    def encode(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, checkout) -> Path:
    """The real recipe with another backbone, and without its demo section (for ResNets)."""
    text = (checkout / "recipes" / "pirl_jigsaw.yaml").read_text()
    text = text[: text.index("\ndemo:")]
    network = "use: fastssl.backbones.resnet\n  name: resnet50\n"
    assert network in text
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(text.replace(network, "use: tests.tiny_backbone\n"))
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)
