"""The memory bank: for every image a unit vector, the running mean of its past embeddings.

NPID (Wu et al. 2018) and PIRL (Misra & van der Maaten 2020) compare an image with the memory of
itself and of others, which costs no second network and no large batch.
Every process holds the whole bank: 512 bytes an image with 128 dimensions, 0.66 GB for ImageNet.
"""

import hashlib

import torch
from torch import Tensor, nn

from fastssl.distributed import gather, rank


class Memory(nn.Module):
    """One unit row an image, read while scoring and written once a step.

    Negatives are a function of the seed and the number of steps finished (and, drawn per image,
    of the rank), not of a generator that somebody moved: a resumed run draws what the unbroken one
    would have drawn, every process from the same checkpoint, and scoring a held-out batch in
    between changes nothing.
    """

    rows: Tensor

    def __init__(self, images: int, dimension: int, *, momentum: float, seed: int):
        """A bank of `images` random directions, the same on every process and device.

        Args:
            images: rows in the listing; those of images that are never seen stay as they began.
            dimension: length of a row.
            momentum: how much of the old row stays when an image is seen again, 0 <= momentum < 1.
            seed: of the first rows and of the negatives; must not differ between processes.
        """
        super().__init__()
        assert images > 0, "a memory bank needs at least one image"
        self.momentum = momentum
        self.seed = seed
        self.steps = 0  # finished: the position in the stream of negatives
        self.seen: list[tuple[Tensor, Tensor]] = []  # index, embedding of this step's batches
        # drawn on the CPU, whose generator gives the same numbers whatever the GPU
        rows = torch.randn(images, dimension, generator=generator("cpu", seed, "rows"))
        rows /= rows.norm(dim=1, keepdim=True)  # in place: 13 million rows are 6.7 GB
        self.register_buffer("rows", rows)

    def draw(self, count: int, *, batch: int | None = None) -> Tensor:
        """Rows to use as negatives in this step, int64: uniform, with replacement.

        One set [count] for the whole step and for all processes, so that two processes score as
        one with the joined batch; or with `batch` a set for each image, [batch, count], that
        differs between processes and between the batches of a step. A bank of no more than
        `count` rows is given whole, each row once: [len(rows)], also with `batch`.
        The image itself may be among them: who scores leaves it out.
        """
        device = self.rows.device
        if count >= len(self.rows):
            return torch.arange(len(self.rows), device=device)
        if batch is None:
            size, stream = (count,), f"step {self.steps}"
        else:
            size, stream = (batch, count), f"step {self.steps}.{len(self.seen)} rank {rank()}"
        numbers = generator(device, self.seed, stream)
        return torch.randint(len(self.rows), size, generator=numbers, device=device)

    def see(self, index: Tensor, embedding: Tensor) -> None:
        """Keep a batch for `finish_step`: `index` [B], int64, and unit `embedding` [B, D]."""
        self.seen.append((index, embedding.detach()))

    @torch.no_grad()
    def finish_step(self) -> None:
        """Write what was seen since the last call, on all processes, into the bank of each.

        row <- unit(momentum * row + (1 - momentum) * mean of the image's embeddings in this step);
        a sum with no direction (zero or not finite) leaves the row as it was. To be called by
        every process, each having seen as many images.
        """
        if not self.seen:
            return
        indices, embeddings = zip(*self.seen, strict=True)
        self.seen.clear()
        # G = images seen by all processes, D = dimension
        index_G = gather(torch.cat(indices))
        embedding_GD = gather(torch.cat(embeddings))
        # A padded batch can hold an image twice. The matrix of equal indices finds them without
        # the wait for the GPU of unique(); in float64, as TF32 would round rows to 10 bits.
        same_GG = (index_G[:, None] == index_G).double()
        with torch.autocast(index_G.device.type, enabled=False):
            mean_GD = same_GG @ embedding_GD.double() / same_GG.sum(1, keepdim=True)
        old_GD = self.rows[index_G]
        new_GD = self.momentum * old_GD + (1 - self.momentum) * mean_GD
        length_G1 = torch.linalg.vector_norm(new_GD, dim=1, keepdim=True)
        sound_G1 = (length_G1 > 1e-12) & length_G1.isfinite()
        new_GD = torch.where(sound_G1, new_GD / length_G1.clamp_min(1e-12), old_GD)
        # copies of an image all write the value of its first, so that their order cannot matter
        self.rows[index_G] = new_GD[same_GG.argmax(1)].to(self.rows.dtype)
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        """The steps finished, beside the rows in state_dict(); a tensor as safetensors wants."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after the steps of `state`; what was seen and not yet written is forgotten."""
        self.steps = int(state)
        self.seen.clear()


def generator(device: str | torch.device, seed: int, stream: str) -> torch.Generator:
    """Random numbers that are a function of `seed` and the name of their `stream` alone."""
    # hashed, because the CPU's generator reads 32 bits of a seed and neighbours must not overlap
    digest = hashlib.sha256(f"memory {seed} {stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
