"""Whether DALI decodes an image: asked of the files that no stricter decoder can judge."""

import functools

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIImageType


def decode(content: bytes) -> None:
    """Decodes an image file as training does on the CPU.

    Raises:
        ValueError: DALI refuses it.
    """
    pipeline = _pipeline()
    pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8)])
    try:
        pipeline.run()
    except RuntimeError:  # whose text says no more
        _pipeline.cache_clear()  # one that failed is dead
        raise ValueError("DALI cannot decode it") from None


@functools.lru_cache(maxsize=1)
def _pipeline() -> Pipeline:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # pyright: ignore[reportArgumentType]  None: no GPU
    with pipeline:
        encoded = fn.external_source(name="encoded")
        pipeline.set_outputs(fn.decoders.image(encoded, output_type=DALIImageType.RGB))
    pipeline.build()
    return pipeline
