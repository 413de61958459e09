"""Trains a backbone on unlabelled images: recipe -> data -> model -> optimizer -> resume -> loop.

    accelerate launch fastssl/train.py recipes/pirl_jigsaw.yaml [section.key=value ...]

Exit codes: 0 done, 1 failed, 2 a mistake in the recipe or its input, 75 stopped by a signal after a
checkpoint (the same command goes on).
"""

import contextlib
import functools
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: let imports start at the checkout, not inside fastssl/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# OpenMP's threads spin while they wait, on cores that the loader's threads need: on two busy cores
# a small CPU run is ten times slower without this. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

from fastssl import (
    backbone_file,
    checkpoint,
    classifier,
    config,
    demo,
    depths,
    distributed,
    failures,
    journal,
    labelled,
    launcher,
    optim,
    order,
    probe,
    regrouping,
    representation,
    run_folder,
    starting,
    stopping,
    trained,
    weights,
)
from fastssl.config import Recipe
from fastssl.head_probe import HeadProbe
from fastssl.loader import Loader, output_names, seed_of, threads_per_process
from fastssl.loader import Options as LoaderOptions
from fastssl.memory import Memory
from fastssl.rehearsal import rehearse, rehearse_probe

MANY = 5000  # images of a probe, from which on it is said that they are being read
COLLAPSED = 0.03  # std of the embeddings, where 1 is spread out and 0 a single point


def main(arguments: Sequence[str]) -> int:
    """Runs the recipe named by the command line; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    return start(lambda: config.load(arguments[0], arguments[1:]))


def start(load: Callable[[], Recipe]) -> int:
    """Runs the recipe that `load` gives; a mistake is one line for the user.

    Returns:
        The exit code.
    """
    together = False
    try:
        recipe = load()
        with contextlib.ExitStack() as until_the_end:
            try:
                return train(recipe, until_the_end)
            finally:
                together = dist.is_initialized()
    except (ValueError, OSError, RuntimeError, TypeError, MemoryError) as error:
        mine = isinstance(error, ValueError | Diverged | DataLost | run_folder.LockLostError)
        said = str(error) if mine else failures.told(error)
        if said is None:
            raise
        # Every process of a machine meets the same mistake, and its first one tells it; but once
        # they work together, a file, a disk or the memory may fail for one of them alone.
        is_own = together and not isinstance(error, Diverged)
        rank = starting.environment("RANK", 0)
        if starting.environment("LOCAL_RANK", 0) == 0 or is_own or failures.is_of_memory(error):
            where = f" (rank {rank} on {platform.node()})" if rank else ""
            print(f"error{where}: {said}", file=sys.stderr, flush=True)
        return 2 if failures.is_mistake(error) else 1
    except KeyboardInterrupt:
        print("interrupted while starting: what was saved before is as it was", file=sys.stderr)
        return 130


def train(recipe: Recipe, until_the_end: contextlib.ExitStack) -> int:
    """One start of a run: fresh, or on from a checkpoint, to its end or to a signal.

    Args:
        recipe: what to run.
        until_the_end: closes what the run holds: lock, journal, process group, signals.

    Raises:
        ValueError: a mistake in the recipe, its input or the run folder, found before the first
            step.
        DataLost: images can't be read any more.
        Diverged: the loss is not a number.
        run_folder.LockLostError: another run may be in the run folder.
        checkpoint.CheckpointError: the last checkpoint could not be written.
    """
    # ---- What is to be done: nothing below has touched a device, nothing is written yet --------
    options, out = recipe.train, _folder(recipe)
    rank, world = starting.environment("RANK", 0), starting.environment("WORLD_SIZE", 1)
    say = starting.say if rank == 0 else starting.silent
    is_first_here = starting.environment("LOCAL_RANK", 0) == 0
    say_here = starting.say if is_first_here else starting.silent  # once a machine
    processes_here = starting.environment("LOCAL_WORLD_SIZE", 1)
    if options.batch % (world * options.accumulate):
        raise config.RecipeError(
            f"train.batch ({options.batch}) must be a multiple of processes ({world}) x "
            f"train.accumulate ({options.accumulate})"
        )
    batch = options.batch // world  # images of this process in an optimizer step
    on_cpu = starting.on_cpu()
    if options.sync_batchnorm and on_cpu:
        raise config.RecipeError("train.sync_batchnorm (true) needs GPUs: give false")
    precision = starting.mixed_precision(options.precision, on_cpu, key="train.precision")
    unknown = set(options.trackers) - {name.value for name in get_available_trackers()}
    if unknown:
        raise config.RecipeError(
            f"train.trackers: {', '.join(sorted(unknown))} is not installed or not known to "
            "Accelerate: pip install it, or take it out"
        )
    if recipe.demo:
        say("data.root is not given: the built-in images and the recipe's demo section are used")
        demo.render(say=say_here)
    # The first process scans, the others find it in the cache.
    with starting.one_at_a_time(demo.cache()):
        samples = recipe.data.module.list_samples(
            recipe.data.options, cache=demo.cache(), say=say_here
        )
    usable = samples.usable
    if len(usable) < options.batch:
        raise config.RecipeError(
            f"{samples.root}: {len(usable)} images are fewer than one batch: give train.batch at "
            f"most {len(usable)} (it is {options.batch}) or more images"
        )
    crop = recipe.pipeline.options.largest_crop
    sides = np.minimum(samples.height, samples.width)[usable]
    small = (sides > 0) & (sides < crop)  # 0: not known
    if small.any():
        say(
            f"data: {small.sum():,} of {len(usable):,} images have a side of less than {crop} "
            "pixels and will be enlarged"
        )
    names = output_names(
        recipe.data.module, samples, recipe.pipeline.module, recipe.pipeline.options
    )
    config.check_outputs(recipe.objective, names, recipe.pipeline)
    steps_per_epoch = order.steps_per_epoch(len(usable), world, batch)
    planned = options.epochs * steps_per_epoch
    steps = min(planned, options.steps or planned)
    fingerprint = {
        "file list": samples.fingerprint,
        "usable images": len(usable),
        run_folder.USABLE: run_folder.hash_of_rows(usable, len(samples)),
        "processes": world,
        "train.batch": options.batch,
        "train.accumulate": options.accumulate,
        "device": "cpu" if on_cpu else "gpu",
        "precision": precision,
    }
    threads = recipe.loader.threads or threads_per_process(processes_here)
    loading = replace(recipe.loader, threads=threads)
    knn = head = None
    folder = probe.folder_of(recipe.probe, recipe.data.options)
    try:
        if folder is not None:
            with starting.one_at_a_time(demo.cache()):
                if "scores" in vars(recipe.objective.module.Objective):
                    head = _head_probe(recipe, samples.classes, folder, loading, say)
                knn = probe.Knn(
                    folder,
                    recipe.probe,
                    reader=recipe.data.module,
                    data=recipe.data.options,
                    graph=recipe.evaluation.module,
                    evaluation=recipe.evaluation.options,
                    cache=demo.cache(),
                    loading=loading,
                    say=say,
                    standardize=representation.standardization(recipe.values),
                )
    except ValueError as error:
        if recipe.probe.root is not None or not failures.is_mistake(error):
            raise
        say(f"probe: none beside data.root ({error})")
    if folder is None:
        say("probe: none (probe.root names a folder with train/<class>/ and val/<class>/)")
    # ---- Model, as yet on the CPU ---------------------------------------------------------------
    set_seed(options.seed)  # the same weights on every process
    backbone = trained.fresh(recipe.backbone.module, recipe.backbone.options)
    if options.weights is not None:  # in place of the random ones, so that the head's stay the same
        fingerprint["train.weights"] = weights.load_into(
            backbone, options.weights, recipe.values["backbone"]
        )
    objective: Any = recipe.objective.module.Objective(
        backbone,
        recipe.objective.options,
        images=len(samples),
        classes=recipe.pipeline.options.classes,
        labels=None if samples.labels is None else torch.from_numpy(samples.labels),
        seed=options.seed,
    )
    learning = depths.learning(objective)
    rehearse(
        recipe.data,
        samples,
        recipe.pipeline,
        objective,
        name=recipe.objective.use,
        # Objectives that compare images join those of all processes, of which here is but one.
        images=max(batch // options.accumulate, min(2, world)),
    )
    if knn is not None:
        how = representation.standardization(recipe.values)
        rehearse_probe(recipe.data, samples, recipe.evaluation, backbone, how)

    # ---- The run folder: nothing is written before --------------------------------------------
    start, saved, held = None, None, None
    if rank == 0:
        run_folder.open_run(out, options.resume, recipe.values)  # reads only: refuses untouched
        held = until_the_end.enter_context(run_folder.lock(out))
        start = run_folder.open_run(out, options.resume, recipe.values)
        if start is not None:
            start, saved = run_folder.load(start, out, options.resume, say)
            skipped = regrouping.skipped(saved["ranks"])
            run_folder.compare_fingerprint(saved["fingerprint"], fingerprint, skipped)

    # ---- Devices and processes -----------------------------------------------------------------
    accelerator = Accelerator(
        cpu=on_cpu,  # without a word, several processes on a CPU would each think they are alone
        mixed_precision=precision,
        log_with=list(options.trackers) or None,
        project_dir=out,
        # Buffers are each process's own: batch norm's are copied from rank 0 before a probe, and a
        # memory bank of a million rows must not travel at every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    until_the_end.callback(accelerator.end_training)
    device = accelerator.device
    if device.type == "cpu":  # launchers set OMP_NUM_THREADS=1, which leaves cores idle
        torch.set_num_threads(threads_per_process(processes_here))
    assert (distributed.rank(), distributed.world()) == (rank, world), "launcher and group disagree"
    # Signals and states are agreed on over the CPU, so that no step waits for a GPU.
    control: Any = dist.new_group(backend="gloo") if world > 1 else None
    start, of_first = distributed.object_from_first((start, fingerprint), control)
    if fingerprint != of_first:  # each machine lists its own copy of the images
        raise config.RecipeError(
            f"{samples.root} on {platform.node()} (rank {rank}) is not what rank 0 sees: "
            f"{fingerprint} here, {of_first} there; give every machine the same files, "
            "quarantine and devices"
        )

    # ---- Data ----------------------------------------------------------------------------------
    micro = batch // options.accumulate

    begun = (0, world)  # the epoch that a start falls into, and the processes it was planned for

    def rows_of_step(step: int, rank: int, world: int, batch: int) -> np.ndarray:
        """The listing's rows that a process sees in optimizer step `step` (from 0)."""
        epoch, step = divmod(step, steps_per_epoch)
        chunks, seed = samples.chunks, options.seed
        if chunks is None:
            plan = order.shuffled(len(usable), seed, epoch, rank, world, batch)
        elif epoch == begun[0] and world != begun[1]:
            plan = rest_of_epoch(rank, world, batch)
        else:
            plan = order.by_chunks(chunks, seed, epoch, rank, world, batch, samples.window)
        return usable[plan[step]]

    @functools.lru_cache(maxsize=1)
    def rest_of_epoch(rank: int, world: int, batch: int) -> np.ndarray:
        """The places of a process in an epoch that was planned for other processes."""
        (epoch, before), chunks, seed = begun, samples.chunks, options.seed
        each = options.batch // before
        plans = [
            order.by_chunks(chunks, seed, epoch, other, before, each, samples.window)
            for other in regrouping.sources(before, rank, world)
        ]
        return regrouping.piece(plans, before, rank, world)

    def rows(position: int) -> np.ndarray:
        """The rows of this process's micro-batch number `position`."""
        step, part = divmod(position, options.accumulate)
        return rows_of_step(step, rank, world, batch)[part * micro : (part + 1) * micro]

    loader = Loader(
        recipe.data.module,
        samples,
        recipe.pipeline.module,
        recipe.pipeline.options,
        rows,
        batch=micro,
        # Differs between processes, or all would crop alike; global rank, or all machines would.
        seed=seed_of(options.seed, rank),
        device=device,
        loading=loading,
        say=starting.say,
    )

    # ---- Model on the device, and optimizer ----------------------------------------------------
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    objective = objective.to(device=device, memory_format=torch.channels_last)
    if options.sync_batchnorm and world > 1:
        objective = torch.nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    if options.compile:
        backbone.compile()
    optimizer = optim.optimizer(recipe.optim, objective)
    with warnings.catch_warnings():
        # torch 2.15 renames broadcast_buffers; Accelerate 1.15 does not know the new name yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(objective, optimizer)
    model.train()
    set_seed(seed_of(options.seed, rank))  # dropout and the like differ between processes

    # ---- On from where it stopped --------------------------------------------------------------
    step, now = 0, None
    recent: list[tuple[Tensor, dict[str, Tensor]]] = []  # loss and metrics since the last line
    if start is not None:
        if saved is None and is_first_here:  # its check sum, once a machine
            saved = checkpoint.load(start)
        if control is not None:
            dist.barrier(group=control)
        saved = saved or checkpoint.load(start, checked=True)
        objective.load_state_dict(saved["objective"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        step, ranks = saved["step"], saved["ranks"]
        if step % steps_per_epoch and "begun" in saved:  # runs older than chunks lack it
            begun = saved["begun"]
        if regrouping.is_regrouped(saved["fingerprint"], fingerprint):
            loader.begin(step * options.accumulate, regrouping.skipped(ranks))
            set_seed(seed_of(options.seed, rank, step))
            parts = saved["fingerprint"]["train.accumulate"]
            pending = regrouping.recent(ranks, parts, options.accumulate)
            now = regrouping.told(saved["fingerprint"], fingerprint)
        else:
            loader.resume(ranks[rank]["loader"])
            checkpoint.set_rng_state(ranks[rank]["rng"])
            pending = ranks[rank]["recent"]
        recent = [
            (loss.to(device), {name: value.to(device) for name, value in metrics.items()})
            for loss, metrics in pending
        ]
        del saved, ranks

    def save() -> Path:
        """Everything, as of `step`."""
        pending = [
            (loss.cpu(), {k: v.cpu() for k, v in metrics.items()}) for loss, metrics in recent
        ]
        here = {"loader": loader.state(), "rng": checkpoint.rng_state(), "recent": pending}
        ranks = distributed.objects_to_first(here, control)
        whole = objective.state_dict()  # of all processes: a bank that is shared out is collected
        if held is None:
            return out
        run_folder.check_lock(held, out)
        epoch = step // steps_per_epoch
        state = {
            "step": step,
            "recipe": recipe.values,
            "fingerprint": fingerprint,
            "objective": whole,
            "optimizer": optimizer.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "ranks": ranks,
            "begun": (epoch, begun[1] if epoch == begun[0] else world),
        }
        return checkpoint.save(out / "checkpoints", step, state, options.keep)

    # ---- Journal -------------------------------------------------------------------------------
    if rank == 0:
        journal.write_start(out, recipe, accelerator, start)
    log = journal.Journal(out, accelerator, recipe, steps=steps, start=start and step)
    until_the_end.callback(log.close)

    def look() -> list[float]:
        """The losses since the last line, over all processes; waits for the GPU.

        Raises:
            Diverged: one is no finite number.
        """
        losses = distributed.gather(torch.stack([loss for loss, _ in recent])[None])
        losses = losses.mean(dim=0).tolist()  # over processes; one a micro-batch
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            at = step - 1 - (len(losses) - 1 - bad) // options.accumulate
            whole = np.concatenate([rows_of_step(at, each, world, batch) for each in range(world)])
            is_saved = checkpoint.latest(out / "checkpoints") is not None
            raise Diverged(at, losses[bad], whole, samples.path, is_saved=is_saved)
        return losses

    # Names of probes whose lines an earlier start has written at the step that this one begins at.
    measured = (step, set[str]())
    if rank == 0 and start is not None:
        measured = (step, _measured({out, start.parent.parent}, step))
    measured = distributed.object_from_first(measured, control)

    def measure() -> bool:
        """The accuracy of the head, and of the backbone by kNN, into the journal.

        Returns:
            Whether that is done; not where a signal asks to stop meanwhile.
        """
        known = measured[1] if step == measured[0] else ()
        by_head = None if "val" in known else head
        by_knn = None if "knn" in known else knn
        images = sum(each.images for each in (by_head, by_knn) if each is not None)
        if images >= MANY:
            log.say(f"step {step}: measuring on {images:,} images")
        asked = functools.partial(stop.agreed, control)
        try:
            if by_head is not None:
                top1, top5 = by_head.accuracies(objective, accelerator, asked)
                log.probe(step, "val", {"accuracy": top1, "top5": top5})
                log.say(f"step {step}: accuracy on val {top1:.1%}, top-5 {top5:.1%}")
            if by_knn is not None:
                accuracies = by_knn.accuracies(backbone, accelerator, asked)
                (k, accuracy), *others = accuracies.items()
                line = {"accuracy": accuracy, "neighbours": k}
                log.probe(step, "knn", line | {f"accuracy_k{k}": value for k, value in others})
                log.say(f"step {step}: kNN accuracy (k = {k}) {accuracy:.1%}")
        except stopping.Stopped:
            return False
        finally:
            model.train()  # what an objective keeps frozen too
        return True

    # ---- Train loop ----------------------------------------------------------------------------
    log.say(
        optim.summary(
            recipe.optim,
            batch=options.batch,
            world=world,
            accumulate=options.accumulate,
            images=len(usable),
            steps_per_epoch=steps_per_epoch,
            steps=planned,
        )
    )
    log.say(learning)
    for module in objective.modules():
        if isinstance(module, Memory):
            log.say(module.summary())
    log.say(
        f"{device}, {accelerator.mixed_precision}, {threads} loader threads a process, run {out}"
    )
    if start is not None:
        log.say(f"going on from {start} (step {step})")
    if now is not None:
        log.say(now)
    if _cannot_restart(world):
        log.say(
            "warning: torchrun's restarts (--max-restarts) fail with several processes, unless "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is in its environment and --rdzv-backend is c10d"
        )
    stop = until_the_end.enter_context(stopping.signals())
    is_due = _due(step, steps_per_epoch, recipe.probe.every_epochs)
    if step == 0 or (is_due and step < steps):  # not yet, where the start before was stopped in it
        measure()
    tensors: dict[str, Tensor] = {}
    began, begun_at = time.perf_counter(), step
    collapsed = guessing = False
    waits = journal.WaitAdvice(recipe)
    while step < steps and not stop.agreed(control):
        lr = optim.learning_rate(
            recipe.optim,
            step,
            steps=planned,
            steps_per_epoch=steps_per_epoch,
            batch=options.batch,
        )
        optim.set_lr(optimizer, lr)
        optimizer.zero_grad()
        for part in range(options.accumulate):
            try:
                tensors = next(loader)
            except ValueError as error:
                raise DataLost(error, checkpoint.latest(out / "checkpoints")) from error
            # Gradients are exchanged once a step, with its last part.
            last = part == options.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss, metrics = model(**tensors)
                accelerator.backward(loss / options.accumulate)
            recent.append((loss.detach(), metrics))
        if options.clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        objective.finish_step()
        step += 1
        log.step(step)

        at_end = step == steps
        to_save = step % options.checkpoint_steps == 0 and not at_end
        to_probe = _due(step, steps_per_epoch, recipe.probe.every_epochs) and not at_end
        if not (to_save or to_probe or at_end or step % options.log_steps == 0):
            continue
        # From here on the host waits for the GPU, on steps that log only.
        losses = look()
        seconds = time.perf_counter() - began
        rate = options.batch * (step - begun_at) / seconds
        line = {
            "epoch": (step - 1) // steps_per_epoch,
            "loss": sum(losses) / len(losses),
            "lr": lr,
            "images_per_second": rate,
            "patches_per_second": rate * sum(t.shape[1] for t in tensors.values() if t.ndim == 5),
            "data_wait": min(1.0, _greatest(loader.data_wait() / seconds, device)),
            **_means([metrics for _, metrics in recent]),
        }
        log.log(step, line)
        images = options.batch * len(recent) / options.accumulate  # that the line is about
        recent.clear()
        advice = waits.after(step - begun_at, line["data_wait"])
        if advice is not None:
            log.say(advice)
        if line.get("std", 1.0) < COLLAPSED and not collapsed:
            collapsed = True
            log.say(
                f"warning: the embeddings are almost all alike (std {line['std']:.2g}, 1 is spread "
                "out): the features collapse; a lower optim.lr or more objective.negatives may help"
            )
        if step >= options.chance_steps and not guessing and _is_chance(line, images):
            guessing = True
            log.say(
                f"warning: after {step:,} steps the pretext accuracy ({line['accuracy']:.2%}) is "
                f"that of guessing ({line['chance']:.2%}): the task is not being learnt; another "
                "optim.lr, a longer warm-up or an easier task (fewer classes) may help"
            )
        if to_save:
            try:
                save()
            except checkpoint.CheckpointError as error:  # the next one may find room again
                log.say(f"warning: {error}")
        if to_probe:  # behind the checkpoint: the start after one that ended in it makes up for it
            measure()
        began, begun_at = time.perf_counter(), step  # neither is training time
        loader.data_wait()

    # ---- Stopped, or done ----------------------------------------------------------------------
    if recent:
        look()  # nothing is saved that no one could go on from
    written = save()
    if control is not None:
        dist.barrier(group=control)  # a process that ends early has its launcher end the others
    if step < steps or not measure():
        log.say(f"stopped by {stop.name} at step {step} of {steps}; {written} holds it all:")
        log.say("the same command goes on from there")
        return stopping.STOPPED
    if rank == 0:
        if "scores" in vars(recipe.objective.module.Objective):
            classifier.save_head(out, objective.head, samples.classes)
        backbone_file.save_backbone(out, backbone, recipe, step=step)
        _last_words(out, log, "random network" if options.weights is None else "at the start")
    return 0


def _is_chance(line: dict[str, Any], answers: float) -> bool:
    """Whether `answers` guesses would be as accurate, give or take three standard deviations."""
    if "accuracy" not in line or "chance" not in line:
        return False
    chance = line["chance"]
    return line["accuracy"] <= chance + 3 * math.sqrt(chance * (1 - chance) / answers)


class Diverged(RuntimeError):
    """The loss is not a finite number: training on would write nonsense into the weights."""

    def __init__(
        self,
        step: int,
        loss: float,
        rows: np.ndarray,
        path: Callable[[int], str],
        *,
        is_saved: bool,
    ) -> None:
        """Names the step (counted from 1) and the images of its batch, on all processes."""
        before = "The last checkpoint is from before. " if is_saved else ""
        listed = ", ".join(str(row) for row in rows)
        super().__init__(
            f"the loss is {loss} at step {step + 1}: a lower optim.lr, optim.warmup_epochs, "
            f"train.clip or train.precision=fp32 may help. {before}"
            f"The batch: rows {listed} of the listing (the first is {path(rows[0])})"
        )


class DataLost(RuntimeError):
    """Images can't be read any more: no mistake in the recipe, which has trained with them."""

    def __init__(self, error: ValueError, saved: Path | None) -> None:
        """Names what `error` does, and where the run goes on."""
        where = "starts anew: nothing was saved yet" if saved is None else f"goes on from {saved}"
        super().__init__(f"{error} (once that is mended, the same command {where})")


def _folder(recipe: Recipe) -> Path:
    out = recipe.train.out
    if out is None:
        return Path("runs") / recipe.name
    return Path(os.path.expanduser(out))  # Path's own raises for an unknown user


def _cannot_restart(world: int) -> bool:
    """Whether torchrun was asked for restarts after which the processes would not find each other.

    Its store outlives them by default, with the addresses of those that have ended (torch 2.15).
    """
    restarts = starting.environment("TORCHELASTIC_MAX_RESTARTS", 0)
    return world > 1 and restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _due(step: int, steps_per_epoch: int, every_epochs: int) -> bool:
    return every_epochs > 0 and step % (steps_per_epoch * every_epochs) == 0


def _measured(folders: Collection[Path], step: int) -> set[str]:
    """The probes of which these run folders have the step's lines; others' lines name a stage."""
    every = [line for folder in folders for line in journal.read(folder) if line["step"] == step]
    return {line["probe"] for line in every if "probe" in line and "stage" not in line}


def _means(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean over micro-batches and processes of each metric."""
    names = list(metrics[0])
    table = torch.stack([torch.stack([values[name] for name in names]) for values in metrics])
    means = distributed.gather(table.mean(dim=0)[None]).mean(dim=0)
    return dict(zip(names, means.tolist(), strict=True))


def _greatest(value: float, device: torch.device) -> float:
    """Of all processes: those that do not wait for images wait for the one that does."""
    return distributed.gather(torch.tensor([value], device=device)).max().item()


def _head_probe(
    recipe: Recipe,
    classes: tuple[str, ...],
    folder: str,
    loading: LoaderOptions,
    say: Callable[[str], None],
) -> HeadProbe:
    """Of an objective that learns classes, on the val split of `folder`."""
    data = labelled.whole(recipe.data.options, str(folder))
    _, val, _ = labelled.splits(recipe.data.module, data, cache=demo.cache(), say=say)
    return HeadProbe(
        val, classes, recipe.evaluation, batch=recipe.probe.batch, loading=loading, say=say
    )


def _last_words(out: Path, log: journal.Journal, before: str) -> None:
    """The accuracy on val; kNN's before (in one word) and after."""
    every = journal.read(out)
    heads = [line for line in every if line.get("probe") == "val"]
    if heads:
        log.say(f"accuracy on val {heads[-1]['accuracy']:.1%}, top-5 {heads[-1]['top5']:.1%}")
    probes = [line for line in every if line.get("probe") == "knn"]
    if probes and probes[0]["step"] == 0:
        first, last = probes[0], probes[-1]
        log.say(
            f"kNN accuracy (k = {last['neighbours']}): {before} {first['accuracy']:.1%}, "
            f"trained {last['accuracy']:.1%}"
        )
    log.say(f"done: {out}/backbone.safetensors, {out}/backbone.json, {out}/metrics.jsonl")


if __name__ == "__main__":
    launcher.mend()
    sys.exit(main(sys.argv[1:]))
