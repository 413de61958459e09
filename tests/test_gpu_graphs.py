"""Every graph has a GPU kernel for every operator: checked where there is no GPU.

Construction refuses GPU tensors as named arguments and GPU-to-CPU edges; the kernels themselves are
looked up in DALI's registry. That a graph's GPU branch does what it should is seen by running its
operators on the CPU.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import backend, fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.external_source import ExternalSource
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType

from fastssl import config, loader
from pipelines.images import Encoded, Pixels

CHECKOUT = Path(__file__).resolve().parents[1]
GRAPHS = sorted(
    path.stem
    for path in (CHECKOUT / "pipelines").glob("*.py")
    if "\ndef graph(" in path.read_text()
)
# Graphs that choose their operators by an option.
WAYS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in GRAPHS),
    ("evaluation", {"interpolation": "bicubic"}),
    (
        "exemplar",
        {
            **{"geometry": "warp", "size": 48, "seed_patch": 0.8, "components": (0.5, 2.0)},
            **{"powers": (0.25, 4.0), "factors": (0.7, 1.4), "offsets": 0.1},
        },
    ),
]
MEMORY = ("preallocate_width_hint", "preallocate_height_hint")
MEMORY += ("device_memory_padding", "host_memory_padding")
RECIPES = sorted(path.stem for path in (CHECKOUT / "recipes").glob("*.yaml"))


def on_the_gpu(graph, options, *, pixels=False, **loading) -> Pipeline:
    # A graph of GPU operators can be made and serialised anywhere; only building needs a device.
    pipeline = Pipeline(batch_size=2, num_threads=1, device_id=None, seed=0)
    with pipeline:
        stored, index = fn.external_source(
            lambda: ([np.zeros(1, np.uint8)] * 2, [np.zeros(1, np.int64)] * 2),
            num_outputs=2,
            dtype=[DALIDataType.UINT8, DALIDataType.INT64],
            ndim=[3 if pixels else 1, 1],
            layout=["HWC" if pixels else "", ""],
        )
        image = Pixels(stored) if pixels else Encoded(stored, loader.Options(**loading))
        outputs = graph(image, index, options, "gpu")
        pipeline.set_outputs(*[node.gpu() for node in outputs.values()])
    pipeline.serialize()
    return pipeline


def operators_of(pipeline: Pipeline) -> list[tuple[str, str]]:
    # The source has no schema: it is Python's, and feeds the CPU side.
    made = [each._op for each in pipeline._ops or []]
    return [(op.schema_name, op.device) for op in made if not isinstance(op, ExternalSource)]


def decoders_of(pipeline: Pipeline) -> list[str]:
    """The operators that decode on the GPU, with their arguments, as DALI prints them."""
    made = [each._op for each in pipeline._ops or [] if not isinstance(each._op, ExternalSource)]
    return [str(op.spec) for op in made if op.device == "mixed"]


def memory_of(spec: str) -> list[int]:
    """What a decoder is told to set aside."""
    found = dict(re.findall(r"^ *(\w+): (\d+)$", spec, re.MULTILINE))
    return [int(found[name]) for name in MEMORY]


def without_kernel(pipeline: Pipeline) -> list[tuple[str, str]]:
    # DALI's stubs leave the registry out, and name the operators of a pipeline privately.
    kernels = {
        "cpu": set(backend.RegisteredCPUOps()),  # pyright: ignore[reportAttributeAccessIssue]
        "gpu": set(backend.RegisteredGPUOps()),  # pyright: ignore[reportAttributeAccessIssue]
        "mixed": set(backend.RegisteredMixedOps()),  # pyright: ignore[reportAttributeAccessIssue]
    }
    operators = operators_of(pipeline)
    assert operators
    return [(name, device) for name, device in operators if name not in kernels[device]]


def test_there_are_graphs():
    assert {"pirl_jigsaw", "evaluation"} <= set(GRAPHS)
    assert "pirl_jigsaw" in RECIPES


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_every_operator_of_a_graph_has_a_kernel_on_the_gpu(name, options):
    module = importlib.import_module(f"pipelines.{name}")
    pipeline = on_the_gpu(module.graph, module.Options(**options))

    assert without_kernel(pipeline) == []
    assert "mixed" in {device for _, device in operators_of(pipeline)}  # decodes on the GPU


@pytest.mark.parametrize(
    "stored",
    [
        {"pixels": True},
        {"decoder": "cpu"},
        {"decoder": "cpu", "region": False},
        {"region": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "options"), WAYS)
def test_every_way_to_store_and_decode_has_kernels_on_the_gpu(name, options, stored):
    module = importlib.import_module(f"pipelines.{name}")
    pipeline = on_the_gpu(module.graph, module.Options(**options), **stored)
    mixed = {operator for operator, device in operators_of(pipeline) if device == "mixed"}

    assert without_kernel(pipeline) == []
    assert bool(mixed) == (stored == {"region": False})


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_s_gpu_decoder_sets_aside_what_the_recipe_says(name):
    module = importlib.import_module(f"pipelines.{name}")
    room: dict[str, Any] = {"decoder_width": 5980, "decoder_height": 6430}
    room |= {"decoder_device_mib": 202, "decoder_host_mib": 135}
    told = decoders_of(on_the_gpu(module.graph, module.Options(), **room))
    untold = decoders_of(on_the_gpu(module.graph, module.Options()))
    schema = backend.GetSchema("decoders__Image")  # pyright: ignore[reportAttributeAccessIssue]
    as_ever = [int(schema.GetArgumentDefaultValueString(name)) for name in MEMORY]

    assert told
    assert all(memory_of(spec) == [5980, 6430, 202 * 2**20, 135 * 2**20] for spec in told)
    assert [memory_of(spec) for spec in untold] == [as_ever] * len(told)


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_the_gpu_s_branch_of_a_graph_puts_out_what_the_cpu_s_does_by_the_same_draws(
    name, options, demo_images, monkeypatch
):
    monkeypatch.setattr(DataNode, "gpu", lambda node: node)  # its operators, on the CPU
    module = importlib.import_module(f"pipelines.{name}")
    files = sorted((demo_images / "train").glob("*/00001.jpg"))[:2]
    images = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    rows = [np.array([row], np.int64) for row in range(2)]
    made = {}
    for device in ("cpu", "gpu"):
        pipeline = Pipeline(batch_size=2, num_threads=2, device_id=None, seed=0)
        with pipeline:
            stored, index = fn.external_source(
                lambda: (images, rows),
                num_outputs=2,
                dtype=[DALIDataType.UINT8, DALIDataType.INT64],
                ndim=[1, 1],
            )
            encoded = Encoded(stored, loader.Options(decoder="cpu"))
            outputs = module.graph(encoded, index, module.Options(**options), device)
            pipeline.set_outputs(*outputs.values())
        run = pipeline.run()
        made[device] = {
            output: [np.asarray(each[row]) for row in range(2)]
            for output, each in zip(outputs, run, strict=True)
        }

    assert made["cpu"].keys() == made["gpu"].keys()
    for output, kernels in made["cpu"].items():
        for one, other in zip(kernels, made["gpu"][output], strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            # All but rounding, which a steep power of HSV makes many levels of.
            assert (abs(one.astype(int) - other) > 3).mean() < 0.002


@pytest.mark.parametrize("overrides", [(), ("data.root=/somewhere",)], ids=["demo", "paper"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_operator_of_a_recipe_s_graph_has_a_kernel_on_the_gpu(name, overrides):
    part = config.load(CHECKOUT / "recipes" / f"{name}.yaml", overrides).pipeline
    pipeline = on_the_gpu(part.module.graph, part.options)

    assert without_kernel(pipeline) == []


def test_an_operator_without_a_gpu_kernel_is_noticed():
    def peeks(encoded, index, options, device):
        return {"shape": fn.peek_image_shape(encoded.data.gpu()), "index": index}

    assert without_kernel(on_the_gpu(peeks, None)) == [("PeekImageShape", "gpu")]
