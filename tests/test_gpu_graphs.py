"""Every graph has a GPU kernel for every operator: checked where there is no GPU.

Construction refuses GPU tensors as named arguments and GPU-to-CPU edges; the kernels themselves are
looked up in DALI's registry.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import backend, fn
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


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operator_of_a_graph_has_a_kernel_on_the_gpu(name):
    module = importlib.import_module(f"pipelines.{name}")
    pipeline = on_the_gpu(module.graph, module.Options())

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
@pytest.mark.parametrize("name", GRAPHS)
def test_every_way_to_store_and_decode_has_kernels_on_the_gpu(name, stored):
    module = importlib.import_module(f"pipelines.{name}")
    pipeline = on_the_gpu(module.graph, module.Options(), **stored)
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
