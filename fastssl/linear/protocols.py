"""The protocols of the papers for linear probes: options of the command `linear`, and its presets.

lbfgs     Kolesnikov et al. 2019 (K19), their default: L-BFGS on features of the middle crop, at
          most 800 updates, l2 = 100 / (M C) with M features and C classes. (Supplement, by memory:
          it is not at hand. How the penalty enters is our reading: the mean cross-entropy
          + l2 / 2 * the sum of the squared weights, biases free, as TensorFlow's l2 has it.)
k19       K19 by SGD, config/evaluation/*.sh: batch 512, 70 epochs, x 0.1 at 30 and 50,
          lr 0.1 * batch / 256, no decay; short side 256 and a random crop of 224, no flip.
k19_long  K19, what Table 2 reports: batch 2048, 520 epochs, x 0.1 at 480 and 500.
mlp       K19's MLP (linear_eval.py: 1000 hidden, ReLU, dropout 0.5); lr 0.01 for 256 images, 180
          epochs, x 0.1 at 60 and 120, batch 512 (supplement, by memory).
goyal     Goyal et al. 2019 as VISSL has it: 28 epochs on ImageNet (14 on Places, 84 on iNaturalist:
          linear.epochs, milestones follow), batch 256, lr 0.01, x 0.1 at 8, 16 and 24, Nesterov,
          decay 5e-4, biases too; batch norm without scale and offset before the linear layer;
          random resized crop and flip. (The paper's own code, fair, has decay 1e-4 for ResNet-50.)
vissl     the same as goyal.
pirl      Misra & van der Maaten 2020: as goyal, but two equally spaced decays (the paper; VISSL's
          configuration of it has the three above) and decay 1e-4 (fair).
Momentum is 0.9 in all. Maps are pooled by max to 9000 values at most by K19's, by average to 9216
by VISSL's (goyal, vissl, pirl); features.pool and features.size have precedence.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from fastssl import optim


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """How heads are trained by SGD; as in Options, with nothing left open."""

    epochs: int
    batch: int
    lr: float
    milestones: tuple[float, ...]
    gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_bias: bool = False
    batchnorm: bool = False
    augment: Literal["none", "crop", "random_crop"]
    hidden: int = 0
    dropout: float = 0.0

    @property
    def schedule(self) -> optim.Options:
        """As the optimizer's section of a recipe."""
        return optim.Options(
            name="sgd",
            lr=self.lr,
            lr_batch=256,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            decay_norm_and_bias=self.decay_bias,
            schedule="multistep" if self.milestones else "constant",
            milestones=self.milestones,
            gamma=self.gamma if self.milestones else 0.1,
        )


K19 = Sgd(epochs=70, batch=512, lr=0.1, milestones=(30.0, 50.0), augment="random_crop")
GOYAL = Sgd(
    epochs=28,
    batch=256,
    lr=0.01,
    milestones=(8.0, 16.0, 24.0),
    nesterov=True,
    weight_decay=5e-4,
    decay_bias=True,
    batchnorm=True,
    augment="crop",
)
PROTOCOLS: dict[str, Sgd | None] = {
    "lbfgs": None,
    "k19": K19,
    "k19_long": replace(K19, epochs=520, batch=2048, milestones=(480.0, 500.0)),
    "mlp": replace(
        K19, epochs=180, lr=0.01, milestones=(60.0, 120.0), hidden=1000, dropout=0.5, augment="none"
    ),
    "goyal": GOYAL,
    "vissl": GOYAL,
    "pirl": replace(GOYAL, milestones=(28 / 3, 56 / 3), weight_decay=1e-4),
}


# How maps become vectors: features.pool, features.size.
POOLING: dict[str, tuple[Literal["max", "avg"], int]] = {
    name: ("avg", 9216) if name in ("goyal", "vissl", "pirl") else ("max", 9000)
    for name in PROTOCOLS
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The `linear` command; null: as the protocol says."""

    protocol: Literal["lbfgs", "k19", "k19_long", "mlp", "goyal", "vissl", "pirl"] = "lbfgs"
    standardize: bool = False  # to mean 0 and deviation 1 by training's statistics: no paper here
    # does; with L-BFGS it reaches the end in fewer passes, and the penalty weighs features alike
    block: int = 8192  # rows of features that are worked on at a time
    memory_gb: float = 8.0  # for features and weights, a process
    # L-BFGS
    updates: int = 800  # at most; the bound on passes over the features is twice as many
    l2: float | None = None  # of mean cross-entropy + l2/2 |W|^2; null: 100 / (features * classes)
    tolerance: float = 1e-5  # the gradient's greatest entry at which it ends (scipy's default)
    # SGD
    epochs: int | None = None  # alone, it stretches the protocol's milestones along
    batch: int | None = None  # of all processes
    lr: float | None = None  # for 256 images, scaled to the batch
    milestones: tuple[float, ...] | None = None  # epochs at which lr drops
    gamma: float | None = None  # what a milestone multiplies lr by
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    decay_bias: bool | None = None  # whether weight_decay takes biases too
    batchnorm: bool | None = None  # normalise features by the batch, without scale and offset
    augment: Literal["none", "crop", "random_crop"] | None = None  # none: cached features of the
    # middle crop; crop: random resized crop and flip, and random_crop: K19's, extracted anew in
    # every epoch (a pass of the backbone over the images each)
    hidden: int | None = None  # length of a hidden layer with ReLU; 0: linear
    dropout: float | None = None  # after the hidden layer
    seeds: tuple[int, ...] = (0,)  # one training each: first weights, order, dropout

    def __post_init__(self) -> None:
        """Refuses what can't be, and keys that nothing reads.

        Raises:
            ValueError: says which value, and what to give.
        """
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol ({self.protocol}) must be one of {', '.join(PROTOCOLS)}")
        if min(self.block, self.updates) < 1:
            raise ValueError(
                f"block ({self.block}) and updates ({self.updates}) must be at least 1"
            )
        if self.memory_gb <= 0:
            raise ValueError(f"memory_gb ({self.memory_gb}) must be above 0")
        if self.l2 is not None and self.l2 < 0:
            raise ValueError(f"l2 ({self.l2}) must be at least 0")
        if self.tolerance < 0:
            raise ValueError(f"tolerance ({self.tolerance}) must be at least 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds ({list(self.seeds)}) must be different numbers from 0 on")
        self._check_that_every_key_is_read()
        if (sgd := self.sgd()) is not None:
            _check(sgd)
            if self.standardize and sgd.augment != "none":
                raise ValueError(
                    "standardize (True) needs cached features: give augment none, or batchnorm in "
                    "its place"
                )

    def sgd(self) -> Sgd | None:
        """The protocol with what was said otherwise; None: L-BFGS."""
        preset = PROTOCOLS[self.protocol]
        if preset is None:
            return None
        said = {name: vars(self)[name] for name in _names(Sgd) if vars(self)[name] is not None}
        if "epochs" in said and "milestones" not in said:
            stretch = self.epochs / preset.epochs if self.epochs else 1
            said["milestones"] = tuple(each * stretch for each in preset.milestones)
        if said.get("hidden", preset.hidden) == 0:
            said.setdefault("dropout", 0.0)  # the protocol's is not read
        if said.get("weight_decay", preset.weight_decay) == 0:
            said.setdefault("decay_bias", False)
        return replace(preset, **said)

    def _check_that_every_key_is_read(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        by_lbfgs, by_sgd = ("updates", "l2", "tolerance"), (*_names(Sgd), "seeds")
        is_lbfgs = PROTOCOLS[self.protocol] is None
        for key in by_sgd if is_lbfgs else by_lbfgs:
            if vars(self)[key] != defaults[key]:
                remedy = (
                    f"give a protocol that trains by SGD too ({', '.join(_names_of_sgd())})"
                    if is_lbfgs
                    else "leave it out, or give protocol lbfgs"
                )
                raise ValueError(
                    f"{key} ({vars(self)[key]}) is not read with protocol {self.protocol}: {remedy}"
                )


def _check(sgd: Sgd) -> None:
    if min(sgd.epochs, sgd.batch) < 1:
        raise ValueError(f"epochs ({sgd.epochs}) and batch ({sgd.batch}) must be at least 1")
    if sgd.batchnorm and sgd.batch < 2:
        raise ValueError("batchnorm needs a batch of at least 2: one image has no deviation")
    if sgd.hidden < 0:
        raise ValueError(f"hidden ({sgd.hidden}) must be at least 0")
    if not 0 <= sgd.dropout < 1:
        raise ValueError(f"dropout ({sgd.dropout}) must be at least 0 and below 1")
    if sgd.dropout and not sgd.hidden:
        raise ValueError(f"dropout ({sgd.dropout}) is not read without a hidden layer: give hidden")
    if sgd.decay_bias and not sgd.weight_decay:
        raise ValueError("decay_bias is not read when weight_decay is 0")
    late = [each for each in sgd.milestones if each >= sgd.epochs]
    if late:
        raise ValueError(
            f"milestones ({list(sgd.milestones)}) must come before the end of {sgd.epochs} epochs"
        )
    _ = sgd.schedule  # refuses rates, momenta and orders that can't be


def _names(options: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(options))


def _names_of_sgd() -> list[str]:
    return [name for name, preset in PROTOCOLS.items() if preset is not None]
