"""The optimizer and its learning rate, step by step.

The schedule is a pure function of the step: nothing to save, nothing that could run too fast when
there are many processes. The loop in train.py has its value written into the optimizer's groups.
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from fastssl import depths

# No float32 holds more once they are multiplied; nobody means such numbers.
MOST_LR, MOST = 1e30, 1e6


@dataclass(frozen=True, kw_only=True)
class Options:
    """The `optim` section of a recipe."""

    name: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    lr: float  # the highest learning rate, for a batch of `lr_batch` images
    lr_batch: int | None = None  # scale lr linearly to train.batch (Goyal et al. 2017, section 2.1)
    momentum: float = 0.9  # sgd and lars
    nesterov: bool = False  # sgd
    betas: tuple[float, float] = (0.9, 0.999)  # adam and adamw
    weight_decay: float = 1e-4  # adam adds it to the gradient, adamw takes it off the weights
    head_weight_decay: float | None = None  # of what is not the backbone; null: the same
    layer_decay: float = 1.0  # what each stage's lr is, of that of the stage above (Howard & Ruder
    # 2018, section 3.2; Bao et al. 2022: 0.65 to 0.75); the head's is lr, the last stage's a step
    # below it
    head_lr: float = 1.0  # what the lr of all that is not the backbone is multiplied by
    decay_norm_and_bias: bool = True  # False: no decay on norms and biases; lars leaves them alone
    trust_coefficient: float = 0.001  # lars (You et al. 2017, section 4: eta)
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    final_lr: float = 0.0  # cosine: the last step's, in the units of lr (scaled along with it)
    milestones: tuple[float, ...] = ()  # multistep: epochs from the start at which lr drops
    gamma: float = 0.1  # multistep: what a milestone multiplies lr by
    warmup_epochs: float = 0.0  # linear, by step, from warmup_lr to lr
    warmup_lr: float = 0.0  # the first step's, in the units of lr (scaled along with it)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr ({self.lr}) must be above 0")
        if self.lr > MOST_LR:
            raise ValueError(f"lr ({self.lr}) must be at most {MOST_LR:g}")
        for name in ("weight_decay", "head_weight_decay", "head_lr", "trust_coefficient"):
            number = vars(self)[name]
            if number is not None and number > MOST:
                raise ValueError(f"{name} ({number}) must be at most {MOST:g}")
        if self.lr_batch is not None and self.lr_batch < 1:
            raise ValueError(f"lr_batch ({self.lr_batch}) must be at least 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum ({self.momentum}) must be at least 0 and below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas ({self.betas}) must be at least 0 and below 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay ({self.weight_decay}) must be at least 0")
        if self.head_weight_decay is not None and self.head_weight_decay < 0:
            raise ValueError(f"head_weight_decay ({self.head_weight_decay}) must be at least 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay ({self.layer_decay}) must be above 0 and at most 1")
        if self.head_lr <= 0:
            raise ValueError(f"head_lr ({self.head_lr}) must be above 0")
        if self.trust_coefficient <= 0:
            raise ValueError(f"trust_coefficient ({self.trust_coefficient}) must be above 0")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"final_lr ({self.final_lr}) must be from 0 to lr ({self.lr})")
        if not 0 <= self.warmup_lr <= self.lr:
            raise ValueError(f"warmup_lr ({self.warmup_lr}) must be from 0 to lr ({self.lr})")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be at least 0")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma ({self.gamma}) must be above 0 and at most 1")
        if self.nesterov and self.momentum == 0:
            raise ValueError(f"momentum ({self.momentum}) must be above 0 when nesterov is true")
        if self.schedule == "multistep":
            self._check_milestones()
        self._check_that_every_key_is_read()

    def _check_milestones(self):
        if not self.milestones:
            raise ValueError("milestones must name the epochs at which a multistep schedule drops")
        if any(a >= b for a, b in pairwise(self.milestones)):
            raise ValueError(f"milestones ({self.milestones}) must ascend")
        if self.milestones[0] <= self.warmup_epochs:
            raise ValueError(
                f"milestones ({self.milestones}) must come after warmup_epochs"
                f" ({self.warmup_epochs})"
            )

    def _check_that_every_key_is_read(self):
        # A key that nobody reads would pass for a setting that was tried.
        read_by = {
            "momentum": self.name in ("sgd", "lars"),
            "nesterov": self.name == "sgd",
            "betas": self.name in ("adam", "adamw"),
            "trust_coefficient": self.name == "lars",
            "final_lr": self.schedule == "cosine",
            "milestones": self.schedule == "multistep",
            "gamma": self.schedule == "multistep",
            "warmup_lr": self.warmup_epochs > 0,
        }
        values = {field.name: (vars(self)[field.name], field.default) for field in fields(self)}
        for key, read in read_by.items():
            value, default = values[key]
            if not read and value != default:
                raise ValueError(
                    f"{key} ({value}) must be left at {default}: it is not read with"
                    f" name {self.name}, schedule {self.schedule} and warmup_epochs"
                    f" {self.warmup_epochs}"
                )


def base_lr(options: Options, batch: int) -> float:
    """The highest learning rate of a run whose optimizer step takes `batch` images in all.

    Linear in the batch from `lr_batch` on (Goyal et al. 2017, section 2.1); `lr` itself without.
    """
    return options.lr * _scale(options, batch)


def learning_rate(
    options: Options, step: int, *, steps: int, steps_per_epoch: int, batch: int
) -> float:
    """The learning rate of the 0-based `step` of a run of `steps` optimizer steps.

    Warm-up: step 0 runs at `warmup_lr`, and step warmup_epochs * steps_per_epoch at `lr`.
    Cosine, over the steps after the warm-up: the first runs at `lr` and the last step of the run at
    `final_lr`, both exactly, so with `final_lr` 0 the last step moves nothing. (VISSL divides by
    `steps` where this divides by `steps - 1`, and so ends one step short of `final_lr`.)
    Multi-step: step round(milestone * steps_per_epoch) is the first at the lower rate.

    Args:
        options: the `optim` section.
        step: 0 ... steps - 1.
        steps: optimizer steps in the whole run, over all resumptions.
        steps_per_epoch: optimizer steps in an epoch.
        batch: images in an optimizer step: processes x accumulate x images per process.
    """
    assert 0 <= step < steps, f"step {step} lies outside of a run of {steps} steps"
    scale = _scale(options, batch)
    warmup = round(options.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return scale * _between(options.warmup_lr, options.lr, step / warmup)
    if options.schedule == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return scale * _between(options.lr, options.final_lr, (1 - math.cos(math.pi * done)) / 2)
    drops = sum(step >= round(milestone * steps_per_epoch) for milestone in options.milestones)
    return scale * options.lr * options.gamma**drops


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share of the learning rate of a step: groups carry their factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def optimizer(options: Options, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `module`'s parameters that require a gradient.

    It starts at `lr` as written; train.py sets each step's `learning_rate` by `set_lr`.

    Raises:
        ValueError: there is nothing to train, or `lars` without timm.
    """
    groups = _groups(options, module)
    if not groups:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
    if options.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
    if options.name in ("adam", "adamw"):
        kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
        return kind(groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    try:
        from timm.optim.lars import Lars  # noqa: PLC0415  # an optional dependency, slow to import
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ValueError("optim.name 'lars' needs timm: pip install 'fastssl[timm]'") from None
    # timm adapts a group only if it is decayed, unless told otherwise: weight_decay 0 would
    # quietly be plain SGD.
    adapted = [{"always_adapt": group.get("weight_decay") != 0, **group} for group in groups]
    return Lars(
        adapted,
        lr=options.lr,
        # timm's annotations say int, after the defaults of 0.
        momentum=options.momentum,  # pyright: ignore[reportArgumentType]
        weight_decay=options.weight_decay,  # pyright: ignore[reportArgumentType]
        trust_coeff=options.trust_coefficient,
    )


def summary(
    options: Options,
    *,
    batch: int,
    world: int,
    accumulate: int,
    images: int,
    steps_per_epoch: int,
    steps: int,
) -> str:
    """What a run starts by printing: the learning rate it really has, and what a step is.

    Args:
        options: the `optim` section.
        batch: images in an optimizer step, over all processes and accumulated passes.
        world: processes.
        accumulate: forward passes in an optimizer step.
        images: images in an epoch.
        steps_per_epoch: optimizer steps in an epoch.
        steps: optimizer steps in the run.
    """
    scale = _scale(options, batch)
    if options.lr_batch is None:
        scaled = "not scaled with the batch"
    else:
        scaled = f"{options.lr:g} at {options.lr_batch} images, scaled to {batch}"
    shares = ""
    if options.layer_decay != 1:
        shares += f", x {options.layer_decay:g} for each stage down from the head"
    if options.head_lr != 1:
        shares += f", the head x {options.head_lr:g}"
    schedule = {
        "cosine": f"cosine to {scale * options.final_lr:g}",
        "multistep": f"x {options.gamma:g} at epochs {_listed(options.milestones)}",
        "constant": "constant",
    }[options.schedule]
    if options.warmup_epochs:
        schedule = (
            f"warm-up from {scale * options.warmup_lr:g} over {options.warmup_epochs:g} epochs,"
            f" then {schedule}"
        )
        if round(options.warmup_epochs * steps_per_epoch) >= steps:
            schedule += " (the run ends within its warm-up)"
    epochs = steps / steps_per_epoch
    return "\n".join(
        [
            f"{options.name}: base lr {options.lr:g}, actual lr {scale * options.lr:g} ({scaled});"
            f" {schedule}{shares}",
            f"effective batch {batch} = {world} {_plural(world, 'process')} x {accumulate}"
            f" accumulated x {batch // (world * accumulate)} images;"
            f" {images} images and {steps_per_epoch} {_plural(steps_per_epoch, 'step')} per epoch;"
            f" {steps} {_plural(steps, 'step')} = {epochs:.4g} epochs",
        ]
    )


def _scale(options: Options, batch: int) -> float:
    return 1.0 if options.lr_batch is None else batch / options.lr_batch


def _between(start: float, end: float, share: float) -> float:
    # Exact at both ends, which start + share * (end - start) is not.
    return (1 - share) * start + share * end


def _groups(options: Options, module: nn.Module) -> list[dict]:
    """Parameter groups, as few as the options need; those of weight_decay 0 are not adapted."""
    factors = _factors(options, module)
    groups: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = None  # the optimizer's
        if not name.startswith("backbone.") and options.head_weight_decay is not None:
            decay = options.head_weight_decay
        # Norm scales, norm offsets and biases are the parameters of fewer than two dimensions, in
        # any architecture and under any name.
        if parameter.ndim < 2 and not options.decay_norm_and_bias:
            decay = 0.0
        groups.setdefault((decay, factors.get(name, 1.0)), []).append(parameter)
    # decayed first, whatever comes first in the module
    order = sorted(groups, key=lambda each: (each[0] == 0.0, each[0] is not None))
    return [
        {"params": groups[decay, factor]}
        | ({} if decay is None else {"weight_decay": decay})
        | ({} if factor == 1.0 else {"lr_factor": factor})
        for decay, factor in order
    ]


def _factors(options: Options, module: nn.Module) -> dict[str, float]:
    """What the learning rate of a parameter is multiplied by, where that is not 1."""
    factors = {}
    if options.head_lr != 1.0:
        names = [name for name, _ in module.named_parameters()]
        factors = {name: options.head_lr for name in names if not name.startswith("backbone.")}
    if options.layer_decay != 1.0:
        backbone = module.get_submodule("backbone")
        found = depths.depths(backbone)
        for name, depth in found.parameters.items():
            factors[f"backbone.{name}"] = options.layer_decay ** (len(found.stages) - depth)
    return factors


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + ("es" if noun.endswith("s") else "s")
