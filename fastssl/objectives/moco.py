"""MoCo v2: two views of an image should embed alike, one through a slow copy of the network.

He et al. 2020 (arXiv:1911.05722), with the head, temperature and views of Chen et al. 2020
(arXiv:2003.04297). What a query q (by the backbone that learns) has to recognise is the key k+ of
its own image among the keys of earlier batches, a queue of K:

    L = -log( exp(q k+ / tau) / (exp(q k+ / tau) + sum_{k in queue} exp(q k / tau)) )           (1)
    key weights <- m key weights + (1 - m) query weights, after every step                      (2)
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastssl.distributed import gather, rank, world
from fastssl.memory import generator

NO_SCORE = -1e30  # of a key that is no negative: exp gives 0, and sums with it stay finite
NOBODY = -1  # the image of a key that is none's


@dataclass(frozen=True, kw_only=True)
class Options:
    """Version 2's settings (Chen et al. 2020); version 1's beside them (He et al. 2020).

    Attributes:
        temperature: tau of eq. 1. v1: 0.07.
        momentum: m of eq. 2.
        queue: K, keys kept; need not be a multiple of the batch.
        dimension: of the embeddings.
        hidden: units between the two layers of the head, null for one linear layer. v1: null.
        exclude_own: leave out earlier keys of the very image that is asked for. The paper keeps
            them, as its queue (65,536) is a twentieth of its images; with a queue longer than an
            epoch they are always there, and the loss would push an image away from itself.
        shuffle_batchnorm: with several processes, each one's keys are computed from images of all
            (He et al. 2020, section 3.3), so that batch norm's statistics do not tell which key
            belongs to which query. With one process there is nothing to shuffle.
    """

    temperature: float = 0.2
    momentum: float = 0.999
    queue: int = 65536
    dimension: int = 128
    hidden: int | None = 2048
    exclude_own: bool = False
    shuffle_batchnorm: bool = True

    def __post_init__(self):
        if not self.temperature >= 1e-4:  # scores of less are no numbers in float32
            raise ValueError(f"temperature ({self.temperature}) must be above 0, 0.0001 at least")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum ({self.momentum}) must be at least 0 and below 1")
        if self.queue < 1:
            raise ValueError(f"queue ({self.queue}) must be at least 1")
        if self.dimension < 2:
            raise ValueError(
                f"dimension ({self.dimension}) must be at least 2: unit vectors of one number are"
                " 1 or -1"
            )
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(
                f"hidden ({self.hidden}) must be at least 1, or null for a linear head"
            )


class Objective(nn.Module):
    """The loss of eq. 1, the network of the keys and their queue.

    What is random is a function of the seed and of the steps finished, as in `memory`: a resumed
    run goes on as the unbroken one, and scoring a held-out batch in between changes nothing.
    """

    queue: Tensor
    queue_images: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        options: Options,
        *,
        images: int,
        classes: int,
        labels: Tensor | None,
        seed: int,
    ):
        """A head for `backbone`, a copy of both for the keys, and a queue of random directions."""
        del images, classes, labels  # no label is looked at, and no image has a place of its own
        super().__init__()
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        self.options = options
        self.seed = seed
        self.backbone = backbone
        self.head = _head(features, options)
        # the same weights to begin with; neither the optimizer nor DDP may know of them
        self.key_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.steps = 0  # finished
        self.enqueued = 0  # keys, ever: the next one's place is the remainder by the queue's length
        self.seen: list[tuple[Tensor, Tensor]] = []  # index and key of this step's batches
        # drawn on the CPU, whose generator gives the same numbers whatever the GPU
        rows = torch.randn(
            options.queue, options.dimension, generator=generator("cpu", seed, "queue")
        )
        self.register_buffer("queue", functional.normalize(rows, dim=1))
        self.register_buffer("queue_images", torch.full((options.queue,), NOBODY))

    def forward(
        self, query: Tensor, key: Tensor, index: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score a batch against the queue.

        Args:
            query: [B, 3, S, S], a view as the backbone takes it.
            key: [B, 3, S, S], another view of the same images.
            index: [B], int64: which images.

        Returns:
            The mean loss of the batch, and: `accuracy`, the part of the queries nearer to their
            own key than to all keys of images in the queue; `chance`, what accuracy would be by
            luck (the random directions that the queue begins with do not count here: any key of
            any image is nearer than those); `std`, the
            spread of the queries over the batch, about 1 when in all directions and 0 when
            collapsed (a batch of one image has none); `agreement`, the mean cosine of query and
            key.
        """
        options = self.options
        query_BD = self._unit(self.head(self.backbone(query)))
        key_BD = self._keys(key)
        with torch.autocast(query.device.type, enabled=False):
            # B = images of the batch, K = keys in the queue, D = dimension
            match_B = (query_BD * key_BD).sum(1) / options.temperature
            scores_BK = query_BD @ self.queue.T / options.temperature
            if options.exclude_own:
                scores_BK = scores_BK.masked_fill(index[:, None] == self.queue_images, NO_SCORE)
            # softplus(x) = log(1 + exp(x)): eq. 1 with the log of the sum over the queue
            loss = functional.softplus(scores_BK.logsumexp(1) - match_B).mean()

        if self.training and torch.is_grad_enabled():  # not while only looking
            self.seen.append((index, key_BD))
        with torch.no_grad():
            real_K = self.queue_images != NOBODY
            right_B = match_B > scores_BK.masked_fill(~real_K, NO_SCORE).amax(1)
            metrics = {
                "accuracy": right_B.float().mean(),
                "chance": 1 / (1 + real_K.sum()),
                "agreement": (query_BD * key_BD).sum(1).mean().float(),
            }
            if len(query_BD) > 1:
                spread_D = query_BD.std(0, correction=0)
                metrics["std"] = options.dimension**0.5 * spread_D.mean().float()
        return loss, metrics

    @torch.no_grad()
    def finish_step(self) -> None:
        """Move the key network (eq. 2), and put the step's keys, of all processes, in the queue.

        The oldest keys give way. Of more keys than places, the last ones stay. The paper moves the
        key network before a batch is scored, which is the same: nothing changes in between.
        """
        if not self.seen:
            return
        indices, keys = zip(*self.seen, strict=True)
        self.seen.clear()
        index_G = gather(torch.cat(indices))[-self.options.queue :]  # G = all processes' keys
        key_GD = gather(torch.cat(keys))[-self.options.queue :]
        # arithmetic on the host's count: no wait for the GPU
        places = torch.arange(len(index_G), device=index_G.device) + self.enqueued
        places %= self.options.queue
        self.queue[places] = key_GD.to(self.queue.dtype)
        self.queue_images[places] = index_G
        self.enqueued = (self.enqueued + len(index_G)) % self.options.queue
        self.steps += 1
        learning: list[Tensor] = [*self.backbone.parameters(), *self.head.parameters()]
        following: list[Tensor] = [*self.key_backbone.parameters(), *self.key_head.parameters()]
        get_ema_multi_avg_fn(self.options.momentum)(following, learning, 0)

    def get_extra_state(self) -> Tensor:
        """Steps finished and the next key's place, beside the queue; as safetensors wants it."""
        return torch.tensor([self.steps, self.enqueued])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from `state`; keys that were seen and not yet enqueued are forgotten."""
        self.steps, self.enqueued = state.tolist()
        self.seen.clear()

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Unit keys [B, D] of this process's `images` [B, 3, S, S]."""
        if world() == 1 or not self.options.shuffle_batchnorm:
            return self._unit(self.key_head(self.key_backbone(images)))
        count = len(images)
        mine = slice(rank() * count, (rank() + 1) * count)
        # the same order on every process, another for every batch of every step
        stream = f"shuffle {self.steps}.{len(self.seen)}"
        numbers = generator(images.device, self.seed, stream)
        draws_G = torch.rand(world() * count, generator=numbers, device=images.device)
        order_G = draws_G.argsort(stable=True)
        # travels as HWC, the memory's own order, and so stays channels-last
        all_GHWC = gather(images.permute(0, 2, 3, 1))
        shuffled = all_GHWC[order_G[mine]].permute(0, 3, 1, 2)
        key_GD = gather(self._unit(self.key_head(self.key_backbone(shuffled))))
        return key_GD[order_G.argsort()[mine]]

    def _unit(self, embedding: Tensor) -> Tensor:
        # in the queue's precision, also when the heads ran in half
        return functional.normalize(embedding.to(self.queue.dtype), dim=-1)


def _head(features: int, options: Options) -> nn.Module:
    """Backbone features to an embedding."""
    if options.hidden is None:
        return nn.Linear(features, options.dimension)
    return nn.Sequential(
        nn.Linear(features, options.hidden),
        nn.ReLU(inplace=True),
        nn.Linear(options.hidden, options.dimension),
    )
