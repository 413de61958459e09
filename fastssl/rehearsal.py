"""One batch on paper: a graph on a real image, a network on tensors that only have shapes.

What does not fit (another number of patches than the head was made for, batch norm over a single
image, a network that shrinks the image to nothing) is told before a device is touched, and costs
neither memory nor the time of a step.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.config import Part, RecipeError
from fastssl.loader import DataError, Loader, Options
from fastssl.patch_network import Standardization
from fastssl.representation import represent

TRIES = 8  # images, until one can be decoded


def rehearse(
    data: Part, samples: Any, pipeline: Part, objective: nn.Module, *, name: str, images: int
) -> None:
    """Scores `images` copies of one image's shapes; leaves the objective as it was.

    Args:
        data: the reader.
        samples: its listing.
        pipeline: the graph.
        objective: on the CPU.
        name: the objective's, for the message.
        images: of a process, scored at a time.

    Raises:
        RecipeError: the objective refuses what the graph puts out.
    """
    tensors = _one_image(data, samples, pipeline)
    if tensors is None:
        return  # the loader will say which files can't be decoded
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_paper = _on_paper(objective, mode)
    with mode, torch.enable_grad(), _quiet():
        batch = {
            key: torch.empty((images, *tensor.shape[1:]), dtype=tensor.dtype)
            for key, tensor in tensors.items()
        }
        try:
            # What a rehearsal can't do (an operator that needs values) says nothing of the run.
            with contextlib.suppress(RuntimeError):
                on_paper(**batch)
        except (ValueError, AssertionError) as error:
            raise RecipeError(
                f"{name} can't be trained on what {pipeline.use} puts out, {images} images at a "
                f"time (train.batch / (processes x train.accumulate)): {_reason(error)}"
            ) from error


def rehearse_probe(
    data: Part, samples: Any, evaluation: Part, backbone: nn.Module, how: Standardization
) -> None:
    """Sends the shapes of one image of the evaluation graph through the backbone.

    Args:
        data: the reader.
        samples: its listing.
        evaluation: the graph.
        backbone: on the CPU; left as it was.
        how: as `represent` takes it.

    Raises:
        RecipeError: the backbone refuses images of that size.
    """
    tensors = _one_image(data, samples, evaluation)
    if tensors is None:
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_paper = _on_paper(backbone, mode).eval()
    with mode, torch.no_grad(), _quiet():
        shapes = {
            key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in tensors.items()
        }
        try:
            # As above: what a rehearsal can't do says nothing of the run.
            with contextlib.suppress(RuntimeError):
                represent(on_paper, shapes, how)
        except (ValueError, AssertionError) as error:
            raise RecipeError(
                f"the backbone can't be probed on what {evaluation.use} puts out: {_reason(error)} "
                "(the section evaluation says their size)"
            ) from error


def _reason(error: Exception) -> str:
    return str(error) or "an assertion of the network does not hold"


def _on_paper(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy with shapes in place of weights: a bank of a million rows is not copied."""
    originals = [*module.parameters(), *module.buffers()]
    shapes: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in originals}
    return copy.deepcopy(module, shapes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of operators that fail, tracebacks of which say less than the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _one_image(data: Part, samples: Any, pipeline: Part) -> dict[str, Tensor] | None:
    """What the graph makes of the first image that can be decoded, on the CPU."""
    for row in samples.usable[:TRIES]:
        loader = Loader(
            data.module,
            samples,
            pipeline.module,
            pipeline.options,
            lambda step, row=row: np.array([row]),
            batch=1,
            seed=0,
            device=torch.device("cpu"),
            loading=Options(threads=1, prefetch=1),
            say=lambda text: None,
        )
        with contextlib.suppress(DataError):
            return next(loader)
    return None
