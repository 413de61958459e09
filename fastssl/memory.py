"""The memory bank: for every image a unit vector, the running mean of its past embeddings.

NPID (Wu et al. 2018) and PIRL (Misra & van der Maaten 2020) compare an image with the memory of
itself and of others, which costs no second network and no large batch.
A row takes 512 bytes with 128 dimensions in float32: 0.66 GB for ImageNet, whole on every process.
A larger bank is shared out: each process holds its part of the rows and sends what others ask for,
so that losses, gradients and rows are those of the whole bank. In bfloat16 it takes half.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.distributed import (
    add_up,
    add_up_and_deal,
    gather,
    gather_to_first,
    place,
    rank,
    world,
)

BLOCK = 2**16  # rows made or collected at a time
SENT = 2**25  # numbers that all processes ask for at a time: 134 MB of float32


class Memory(nn.Module):
    """One unit row an image, read while scoring and written once a step.

    Negatives are a function of the seed and the number of steps finished (and, drawn per image,
    of the rank), not of a generator that somebody moved: a resumed run draws what the unbroken one
    would have drawn, every process from the same checkpoint, and scoring a held-out batch in
    between changes nothing.

    Attributes:
        rows: [own, dimension], those of this process: images first ... first + own - 1.
        images: rows in all.
        shards: into how many parts the bank is shared out, one a process; 1: each holds it whole.
        precision: of the numbers that `read` gives; float32 also for a bank in bfloat16.
    """

    rows: Tensor

    def __init__(
        self,
        images: int,
        dimension: int,
        *,
        momentum: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
        shard_gb: float = math.inf,
    ):
        """A bank of `images` random directions, the same on every process and device.

        Args:
            images: rows in the listing; those of images that are never seen stay as they began.
            dimension: length of a row.
            momentum: how much of the old row stays when an image is seen again, 0 <= momentum < 1.
            seed: of the first rows and of the negatives; must not differ between processes.
            dtype: of the rows. Half of the bytes with bfloat16, rounded at random (`finish_step`).
            shard_gb: a bank of more gigabytes is shared out over the processes, of which there
                must then be as many at every call, each calling the same methods.
        """
        super().__init__()
        assert images > 0, "a memory bank needs at least one image"
        self.images = images
        self.momentum = momentum
        self.seed = seed
        self.steps = 0  # finished: the position in the stream of negatives
        self.seen: list[tuple[Tensor, Tensor]] = []  # index, embedding of this step's batches
        self._shared: tuple[int, Tensor] | None = None  # negatives of this step: their number, rows
        here, processes = place()
        self.shards = processes if images * dimension * dtype.itemsize > shard_gb * 1e9 else 1
        bounds = [images * part // self.shards for part in range(self.shards + 1)]
        self.first, end = (bounds[here], bounds[here + 1]) if self.shards > 1 else (0, images)
        self.register_buffer("rows", self._first_rows(end, dimension, dtype))

    @property
    def precision(self) -> torch.dtype:
        return torch.promote_types(self.rows.dtype, torch.float32)

    def summary(self) -> str:
        """How much memory it takes, in a line for the user."""
        each, dimension = self.rows.element_size(), self.rows.shape[1]
        whole = self.images * dimension * each / 1e9
        kind = str(self.rows.dtype).removeprefix("torch.")
        what = f"memory bank: {self.images:,} rows of {dimension} in {kind}, {whole:.2g} GB"
        if self.shards == 1:
            return f"{what} on each process"
        part = math.ceil(self.images / self.shards) * dimension * each / 1e9
        return f"{what} shared out over {self.shards} processes, {part:.2g} GB on each"

    def draw(self, count: int, *, batch: int | None = None) -> Tensor:
        """Rows to use as negatives in this step, int64: uniform, with replacement.

        One set [count] for the whole step and for all processes, so that two processes score as
        one with the joined batch; or with `batch` a set for each image, [batch, count], that
        differs between processes and between the batches of a step. A bank of no more than
        `count` rows is given whole, each row once: [images], also with `batch`.
        The image itself may be among them: who scores leaves it out.
        """
        device = self.rows.device
        if count >= self.images:
            return torch.arange(self.images, device=device)
        if batch is None:
            size, stream = (count,), f"step {self.steps}"
        else:
            size, stream = (batch, count), f"step {self.steps}.{len(self.seen)} rank {rank()}"
        numbers = generator(device, self.seed, stream)
        return torch.randint(self.images, size, generator=numbers, device=device)

    def read(self, index: Tensor) -> Tensor:
        """The rows [..., dimension] of `index` [...], int64, which may differ between processes.

        With a bank that is shared out, every process must ask, and for as many.
        """
        if self.shards == 1:
            return self.rows[index].to(self.precision)
        # Everyone hears what everyone asks for, puts its own rows among zeros, and the sum is what
        # was asked for, to the bit. In pieces: 4,096 negatives for each of 64 images are 134 MB for
        # each of the processes.
        pieces = index.flatten().split(max(1, SENT // (self.shards * self.rows.shape[1])))
        found = [add_up_and_deal(self._among_zeros(gather(piece))) for piece in pieces]
        return torch.cat(found).unflatten(0, index.shape).to(self.precision)

    def negatives(self, count: int, *, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """What `draw` gives, and the rows of it: [count, dimension] or [batch, count, dimension].

        With a bank that is shared out, a set for all images is sent once a step.
        """
        drawn = self.draw(count, batch=batch)
        if self.shards == 1 or drawn.dim() == 2:
            return drawn, self.read(drawn)
        if self._shared is None or self._shared[0] != count:
            self._shared = count, add_up(self._among_zeros(drawn))
        return drawn, self._shared[1].to(self.precision)

    def see(self, index: Tensor, embedding: Tensor) -> None:
        """Keep a batch for `finish_step`: `index` [B], int64, and unit `embedding` [B, D]."""
        self.seen.append((index, embedding.detach()))

    @torch.no_grad()
    def finish_step(self) -> None:
        """Write what was seen since the last call, on all processes, into the bank.

        row <- unit(momentum * row + (1 - momentum) * mean of the image's embeddings in this step);
        a sum with no direction (zero or not finite) leaves the row as it was. To be called by
        every process, each having seen as many images.

        A bfloat16 is rounded up or down at random, by the seed and the step, so that the mean is
        right: rounded to the nearest, a row stops moving once a step is less than half of its last
        bit: with momentum 0.5 within 0.3 % of its length from where it should be, with 0.9 2 %,
        with 0.99 19 % (tests/test_memory.py).
        """
        if not self.seen:
            return
        assert self.shards in (1, world()), "a bank that is shared out needs all of its processes"
        self._shared = None
        indices, embeddings = zip(*self.seen, strict=True)
        self.seen.clear()
        # G = images seen by all processes, D = dimension
        index_G = gather(torch.cat(indices))
        embedding_GD = gather(torch.cat(embeddings))
        if len(self.rows):
            self._write(index_G, embedding_GD)
        self.steps += 1

    def _write(self, index_G: Tensor, embedding_GD: Tensor) -> None:
        # A padded batch can hold an image twice. The matrix of equal indices finds them without
        # the wait for the GPU of unique(); in float64, as TF32 would round rows to 10 bits.
        same_GG = (index_G[:, None] == index_G).double()
        with torch.autocast(index_G.device.type, enabled=False):
            mean_GD = same_GG @ embedding_GD.double() / same_GG.sum(1, keepdim=True)
        here_G, row_G = self._own(index_G)
        old_GD = self.rows[row_G].to(self.precision)
        new_GD = self.momentum * old_GD + (1 - self.momentum) * mean_GD
        length_G1 = torch.linalg.vector_norm(new_GD, dim=1, keepdim=True)
        sound_G1 = (length_G1 > 1e-12) & length_G1.isfinite() & here_G[:, None]
        new_GD = torch.where(sound_G1, new_GD / length_G1.clamp_min(1e-12), old_GD)
        new_GD = self._rounded(new_GD)
        # Copies of an image all write the value of its first, so that their order cannot matter;
        # images of other processes all write that of the first one of this, or the row as it was.
        from_G = torch.where(here_G, same_GG.argmax(1), here_G.int().argmax())
        self.rows[row_G[from_G]] = new_GD[from_G]

    def _rounded(self, exact_GD: Tensor) -> Tensor:
        """In the type of the rows."""
        if self.rows.dtype != torch.bfloat16:
            return exact_GD.to(self.rows.dtype)
        numbers = generator(exact_GD.device, self.seed, f"round {self.steps}")
        up_GD = torch.randint(
            2**16, exact_GD.shape, generator=numbers, device=exact_GD.device, dtype=torch.int32
        )
        # A bfloat16 is the upper half of a float32: the lower one, from 0 to 1 of the last bit, is
        # added to a number from there to carry as often as it is large, then cut off.
        bits_GD = exact_GD.float().view(torch.int32) + up_GD
        return (bits_GD & -(2**16)).view(torch.float32).to(torch.bfloat16)

    def _own(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `index` are rows of this process, and where among them; any for the others."""
        row = index - self.first
        here = (row >= 0) & (row < len(self.rows))
        return here, row.clamp(0, len(self.rows) - 1)

    def _among_zeros(self, index_N: Tensor) -> Tensor:
        """The rows [N, D] of those of `index_N` that this process holds, zeros for the others."""
        if not len(self.rows):
            return self.rows.new_zeros(len(index_N), self.rows.shape[1])
        here_N, row_N = self._own(index_N)
        return self.rows[row_N].masked_fill_(~here_N[:, None], 0)

    def _first_rows(self, end: int, dimension: int, dtype: torch.dtype) -> Tensor:
        """Rows first ... end - 1, drawn a block at a time: no process draws those of another."""
        rows = torch.empty(end - self.first, dimension, dtype=dtype)
        for begin in range(self.first // BLOCK * BLOCK, end, BLOCK):
            stream = f"rows {begin}" if begin else "rows"
            # drawn on the CPU, whose generator gives the same numbers whatever the GPU
            block = torch.randn(
                min(BLOCK, self.images - begin),
                dimension,
                generator=generator("cpu", self.seed, stream),
            )
            block /= block.norm(dim=1, keepdim=True)
            mine = block[max(self.first - begin, 0) : end - begin]
            at = max(begin - self.first, 0)
            rows[at : at + len(mine)] = mine
        return rows

    def _collected(self) -> Tensor:
        """All rows [images, D] on the CPU of rank 0, a few at a time; elsewhere none, [0, D]."""
        dimension = self.rows.shape[1]
        whole = torch.empty(self.images if rank() == 0 else 0, dimension, dtype=self.rows.dtype)
        bounds = [self.images * part // self.shards for part in range(self.shards + 1)]
        few = max(1, BLOCK // self.shards)
        for begin in range(0, math.ceil(self.images / self.shards), few):
            piece = self.rows.new_zeros(few, dimension)
            own = self.rows[begin : begin + few]
            piece[: len(own)] = own
            for part, each in enumerate(gather_to_first(piece)):
                at, end = bounds[part] + begin, bounds[part + 1]
                whole[at : min(at + few, end)] = each[: max(0, end - at)].cpu()
        return whole

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The whole bank, on rank 0, whatever the parts: every process must ask for its state."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shards > 1:
            destination[prefix + "rows"] = self._collected()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Of a whole bank the own part: no more of a file that is mapped is held in memory."""
        whole = state_dict.get(prefix + "rows")
        if self.shards > 1 and whole is not None and len(whole) == self.images:
            own = whole[self.first : self.first + len(self.rows)]
            state_dict = {**state_dict, prefix + "rows": own}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def get_extra_state(self) -> Tensor:
        """The steps finished, beside the rows in state_dict(); a tensor as safetensors wants."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after the steps of `state`; what was seen and not yet written is forgotten."""
        self.steps = int(state)
        self.seen.clear()
        self._shared = None


def generator(device: str | torch.device, seed: int, stream: str) -> torch.Generator:
    """Random numbers that are a function of `seed` and the name of their `stream` alone."""
    # hashed, because the CPU's generator reads 32 bits of a seed and neighbours must not overlap
    digest = hashlib.sha256(f"memory {seed} {stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
