"""Which run folder may be written into, and where a run in it goes on. Nothing is overwritten.

A run folder is fresh, interrupted or finished (it holds backbone.json). An interrupted run goes on
with the same recipe; everything else is refused with what was found and the ways out. `lock` keeps
a second run out of the folder, `open_run` decides, and `compare_fingerprint` checks what a recipe
does not say.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from fastssl import checkpoint, regrouping
from fastssl.config import FREE_ON_RESUME, RecipeError, defaults, differences

_FILES = "file list"  # its name in a fingerprint
USABLE = "which images are usable"  # the same; checkpoints of before it was compared lack it
# A checkpoint's fingerprint is compared to it, together with the number of processes.
_FREE = FREE_ON_RESUME | {regrouping.PARTS}
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # Lustre mounted without flock, some NFS


class LockLostError(RuntimeError):
    """Another run may be in the folder; the message is the whole of what the user should see."""


def open_run(out: Path, resume: str, values: dict[str, dict[str, Any]]) -> Path | None:
    """The checkpoint that a run in `out` goes on from; None for a run from its first step.

    Reads only.

    Args:
        out: the run folder; may be absent.
        resume: `auto`: on where the same recipe was interrupted in `out`, else from the start.
            `never`: from the start, in a fresh folder. Else the path of a run folder (its last
            checkpoint) or of a checkpoint in one, to go on from in a fresh folder or, for its last
            one, in its own.
        values: this recipe's, as `config.Recipe.values`.

    Raises:
        RecipeError: `out` holds a finished run, another recipe or files of something else; `resume`
            names no checkpoint or one of another recipe.
    """
    refuse_unwritable(out)
    if resume == "never" and not _is_fresh(out):
        raise RecipeError(
            f"{out} is not empty and train.resume is 'never': name another folder"
            " (train.out=...), delete this one, or go on with its run (train.resume=auto)"
        )
    given = None if resume in ("auto", "never") else _given(_named(resume), values)
    if _is_fresh(out):
        return given
    newest = checkpoint.latest(out / "checkpoints")
    recipe = _recipe(out)
    if newest is None and not _has_trained(out) and _unlike(recipe, values):
        return given  # a start that failed before its first step: its mistake may be mended here
    _refuse_other_recipe(out, recipe, values)
    # A run that was begun from a checkpoint elsewhere and stopped before its first own goes on
    # from there again; from its first step it would be another run.
    begun_from = str(recipe["train"]["resume"])
    if given is None:
        elsewhere = begun_from not in ("auto", "never") and newest is None
        return _given(_named(begun_from), values) if elsewhere else newest
    if given.parent.resolve() == (out / "checkpoints").resolve():
        if newest is not None and given.resolve() != newest.resolve():
            raise RecipeError(
                f"train.resume ({resume}) is not the last checkpoint of {out}, {newest.name}: to go"
                " on from it name another folder (train.out=...), or delete those after it"
            )
        return given
    if _named(begun_from).resolve() != _named(resume).resolve():
        raise RecipeError(
            f"{out} holds another run, which was begun with train.resume={begun_from}: to go on"
            f" from {resume} name another folder (train.out=...), to go on with the run in {out}"
            " give train.resume=auto"
        )
    return newest or given


def load(start: Path, out: Path, resume: str, say: Callable[[str], None]) -> tuple[Path, dict]:
    """The checkpoint `start` that `open_run` chose, or the one before it where it is damaged.

    Args:
        start: what `open_run` gave.
        out: as for `open_run`.
        resume: as for `open_run`. A checkpoint that is named by its own path is taken or refused.
        say: told of a damaged one.

    Returns:
        The path of the checkpoint that was read, and its state.

    Raises:
        RecipeError: as `checkpoint.load` and `checkpoint.load_newest`.
    """
    is_its_own = start.parent.resolve() == (out / "checkpoints").resolve()
    if _named(resume).is_file() or not (is_its_own or _named(resume).is_dir()):
        return start, checkpoint.load(start)
    return checkpoint.load_newest(start, say)


def lock(out: Path, *, wait: float = 20.0, say: Callable[[str], None] = print) -> IO[str]:
    """Take `out`, made if it is not there, for this run; the lock lasts until the file is closed.

    It ends with the process, however that ends: there are no stale locks. Only the main process
    calls this. Writes `.lock` into a folder that is fresh or an interrupted run, into no other, and
    deletes what a killed process left unfinished.

    Args:
        out: the run folder.
        wait: seconds to wait for a run in `out` that is just ending.
        say: told once if there is one.

    Raises:
        RecipeError: another run is using `out`; or it may not be written into, or cannot.
    """
    refuse_unwritable(out)
    file = _lock_file(out)
    deadline = time.monotonic() + wait
    waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_lock_of(file, out):
                break
            file.close()  # deleted since it was opened: a lock that nobody else would meet
            file = _lock_file(out)
        except BlockingIOError:
            if not waited:
                say(f"{out} is in use by {_holder(file)}; waiting up to {wait:g} s for its end")
                waited = True
            if time.monotonic() >= deadline:
                holder = _holder(file)
                file.close()
                raise RecipeError(
                    f"{out} is in use by {holder}: wait for its end, stop it, or name another"
                    " folder (train.out=...). Deleting its .lock would not end it, and would let"
                    " two runs write over each other"
                ) from None
            time.sleep(min(0.2, wait))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            say(f"{out} is on a file system without locks: see that no second run uses it")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    checkpoint.sweep(out)
    return file


def check_lock(file: IO[str], out: Path) -> None:
    """Check that `out` is still this run's alone; cheap.

    Args:
        file: what `lock` gave.
        out: the run folder.

    Raises:
        LockLostError: its `.lock` was deleted or replaced.
    """
    if not _is_lock_of(file, out):
        raise LockLostError(
            f"{out / '.lock'} was deleted or replaced while this run held it, so that another run"
            " may be writing here: this one ends and writes nothing more. Never delete that file;"
            " the same command goes on from the last checkpoint, if one was saved"
        )


def refuse_unwritable(out: Path) -> None:
    """Check that `out` is a fresh folder or holds an interrupted run.

    Raises:
        RecipeError: it holds a finished run or files of something else, or is a file.
    """
    try:
        if out.exists() and not out.is_dir():
            raise RecipeError(f"train.out ({out}) is a file: name a folder")
        if _is_fresh(out):
            return
    except OSError as error:
        reason = f"cannot be read: {error.strerror}; name another folder"
        raise RecipeError(f"train.out ({out}) {reason}") from error
    if (out / "backbone.json").exists():
        raise RecipeError(
            f"{out} holds a finished run ({_finished_at(out)}): to train anew name another folder"
            f" (train.out=...), to go on from it give train.resume={out} and another train.out"
        )
    if not (out / "recipe.yaml").exists():
        some = sorted(path.name for path in out.iterdir() if not _is_ours(path))[0]
        raise RecipeError(
            f"{out} is no run folder: it holds {some} and no recipe.yaml; name a new or an empty"
            " folder (train.out=...)"
        )


def compare_fingerprint(
    saved: dict[str, Any], here: dict[str, Any], skipped: dict[int, str] | None = None
) -> None:
    """Check that a run goes on with the very data and batches that it was started with.

    Args:
        saved: name of a thing that must not change -> its value, when the checkpoint was written.
            The number of processes may, and with it the parts of a batch.
        here: the same for this start.
        skipped: the checkpoint's skip list: what may have been deleted since.

    Raises:
        RecipeError: names each that differs, with both values.
    """
    free = regrouping.may_differ(saved, here)
    saved = {USABLE: here[USABLE], **saved} if USABLE in here else saved
    unlike = {
        name: f"  {name}: {saved.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in dict.fromkeys([*saved, *here])
        if name not in saved or name not in here or (saved[name] != here[name] and name not in free)
    }
    if unlike:
        remedy = ""
        if _FILES in unlike:
            remedy = _lost(skipped or {})
        elif USABLE in unlike:
            remedy = (
                "\n  the file of data.quarantine changed since, or other images can't be read, or"
                " can again: undo that"
            )
        raise RecipeError(
            "the checkpoint cannot be gone on from, since this start differs:\n"
            + "\n".join(unlike.values())
            + remedy
            + "\nmake them equal again, or start anew in another folder (train.out=...)"
        )


def hash_of_rows(rows: np.ndarray, count: int) -> str:
    """A short hash of which of `count` rows are in `rows`, int64; < 0.1 s for 13 million."""
    is_in = np.zeros(count, bool)
    is_in[rows] = True
    return hashlib.blake2b(np.packbits(is_in).data, digest_size=8).hexdigest()


def _lost(skipped: dict[int, str]) -> str:
    """What to do about files that were deleted or replaced while the run was reading them."""
    if not skipped:
        return (
            "\n  a file was added, deleted, renamed or replaced by one of another size since: undo"
            " that"
        )
    some = "".join(f"\n    {reason}" for reason in list(skipped.values())[:5])
    return (
        f"\n  {len(skipped)} that could not be read while training stay skipped; one that was"
        " deleted or replaced since has to come back first, an image of its name and former size in"
        " bytes. What it shows does not matter: any smaller JPEG of that name does, made as long by"
        f" `truncate -s BYTES FILE`:{some}"
    )


def _is_fresh(out: Path) -> bool:
    return not out.exists() or all(_is_ours(path) for path in out.iterdir())


def _has_trained(out: Path) -> bool:
    """Whether metrics.jsonl tells of a step."""
    try:
        text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return False
    return any('"loss"' in line for line in text.splitlines())


def _is_ours(path: Path) -> bool:
    """Whether `path` is what a run leaves that was killed before it wrote anything."""
    return path.name == ".lock" or (path.name.startswith(".") and path.suffix == ".tmp")


def _given(resume: Path, values: dict[str, dict[str, Any]]) -> Path:
    """The checkpoint that `train.resume` names by its own path or its run folder's."""
    try:
        there = resume.exists()
    except OSError as error:  # a name that is too long, a folder that is closed
        raise RecipeError(
            f"train.resume ({str(resume)[:200]}) cannot be looked at: {error.strerror}"
        ) from None
    if not there:
        raise RecipeError(
            f"train.resume ({resume}) does not exist: give auto, never, a run folder or a"
            " checkpoint in one"
        )
    run = resume if resume.is_dir() else resume.absolute().parent.parent
    path = checkpoint.latest(run / "checkpoints") if resume.is_dir() else resume
    if path is None and resume.absolute().name == "checkpoints":
        raise RecipeError(
            f"train.resume ({resume}) is a folder of checkpoints: give the run folder, {run.parent}"
            ", or one of them"
        )
    if path is None:
        raise RecipeError(f"train.resume ({resume}) has no checkpoint in {run / 'checkpoints'}")
    if not (run / "recipe.yaml").exists():
        raise RecipeError(
            f"train.resume ({resume}) is in no run folder: {run / 'recipe.yaml'} is not there"
        )
    _refuse_other_recipe(run, _recipe(run), values)
    return path


def _named(resume: str) -> Path:
    # Path.expanduser raises for an unknown user.
    return Path(os.path.expanduser(resume))


def _recipe(run: Path) -> dict[str, dict[str, Any]]:
    """The `values` of the recipe that was run in `run`."""
    path = run / "recipe.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    sections = values if isinstance(values, dict) else {}
    keys_in_each = all(isinstance(keys, dict) for keys in sections.values())
    if not keys_in_each or "resume" not in sections.get("train", ()):
        raise RecipeError(
            f"{path} is not the recipe of a run: name another folder (train.out=...), or delete"
            f" {run} if it holds nothing of use"
        )
    return sections


def _refuse_other_recipe(
    run: Path, recipe: dict[str, dict[str, Any]], values: dict[str, dict[str, Any]]
) -> None:
    unlike = _unlike(recipe, values)
    if unlike:
        lines = "\n".join(f"  {line}" for line in unlike)
        raise RecipeError(
            f"{run} holds a run of another recipe:\n{lines}\n"
            "to train anew name another folder (train.out=...), to go on make these keys equal"
        )


def _unlike(recipe: dict[str, dict[str, Any]], values: dict[str, dict[str, Any]]) -> list[str]:
    """What differs; a key that the saved recipe is too old to have stood at its default."""
    return differences(recipe, values, _FREE, unsaid=defaults(values))


def _finished_at(out: Path) -> str:
    try:
        return f"step {json.loads((out / 'backbone.json').read_text(encoding='utf-8'))['step']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "with an unreadable backbone.json"


def _lock_file(out: Path) -> IO[str]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return (out / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"train.out ({out}) cannot be written: {error.strerror}; name another folder"
        ) from error


def _is_lock_of(file: IO[str], out: Path) -> bool:
    """Whether `file` is what the next run would open."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), (out / ".lock").stat())
    except FileNotFoundError:
        return False
    except OSError:  # a network disk that fails for a moment says nothing of it
        return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"
