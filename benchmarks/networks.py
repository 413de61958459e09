"""K19's networks beside torchvision's resnet50: images/s of forward and backward, and memory.

    python -m benchmarks networks [NETWORK ...] [--widenings 4,8] [--side 64] [--out FILE.json]
    python -m benchmarks networks --table FILE.json

NETWORKs are of torchvision (always there: what the others are compared with), v1, v2, v2- (no last
ReLU), revnet (reversible), revnet-plain, vgg19; none: all. Each is measured contiguous,
channels-last and compiled (torch.compile of a channels-last one; its first step does not count), of
every k by turns in one process with torchvision's resnet50 and a large matrix product, whose
TFLOP/s are called the peak. A GPU is given 224 pixels, bfloat16 and k = 4, 8, 12 and 16, a CPU 64
pixels, float32 and k = 4. Activations are what one step keeps for its backward pass at most.
--table prints what a result holds as Markdown, and measures nothing.
"""

import argparse
import difflib
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks import method, network_step, result
from benchmarks.__main__ import run_command
from benchmarks.network_step import MATMUL, NETWORKS, REFERENCE, VARIANTS, Setting, Stepper, Variant
from benchmarks.result import Row

HELP = "K19's networks beside torchvision's resnet50: images/s, TFLOP/s and activations"
SIDE = {"cpu": 64, "cuda": 224}  # pixels
BATCH = {"cpu": 8, "cuda": 64}
PRECISION = {"cpu": "float32", "cuda": "bf16"}
WIDENINGS = {"cpu": "4", "cuda": "4,8,12,16"}
PEAK = "activations_peak_mb"  # an image
SLOW = 0.95  # of torchvision's rate at equal GMACs, below which it is said where the time goes


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--widenings", metavar="K,K", help="K19's k (default: 4; GPU: 4,8,12,16)")
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        metavar="A,B",
        help="which (default %(default)s); the first run compiles for minutes",
    )
    parser.add_argument("--side", type=int, help="pixels of the images (default: 64; GPU: 224)")
    parser.add_argument("--batch", type=int, help="images a step (default: 8; GPU: 64)")
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), help="default: float32; GPU: bf16"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print that result, only")
    method.add_common(parser, seconds=2.0)


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints table and conclusions, writes the JSON.

    Raises:
        ValueError: what is asked for can't be measured; told before anything is.
    """
    if arguments.table is not None:
        found = result.read(arguments.table)
        if found.benchmark != "networks":
            raise ValueError(f"{arguments.table} is of {found.benchmark}: give one of networks")
        _say(table(found.rows))
        _say("\n".join(found.conclusions))
        return 0
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    on = Setting(
        device=torch.device(kind),
        side=SIDE[kind] if arguments.side is None else arguments.side,
        batch=BATCH[kind] if arguments.batch is None else arguments.batch,
        bf16=(arguments.precision or PRECISION[kind]) == "bf16",
    )
    if on.side < 1:
        raise ValueError(f"--side ({on.side}) must be at least 1")
    if on.batch < 2:
        raise ValueError(f"--batch ({on.batch}) must be at least 2: norms need two values")
    names = _names(arguments.networks)
    variants = _variants(arguments.variants)
    widenings = _widenings(arguments.widenings or WIDENINGS[kind])
    for widening in widenings:
        for name in names:
            try:
                network_step.counts(name, widening, on.side)
            except ValueError as error:  # too small for its strides
                raise ValueError(f"--side ({on.side}), {name}: {error}") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    if kind == "cuda":  # as fastssl/train.py sets them
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    rows: list[Row] = []
    left_out: list[str] = []
    try:
        settings = {
            "networks": names,
            "widenings": widenings,
            "variants": variants,
            "side": on.side,
            "batch": on.batch,
            "precision": "bf16" if on.bf16 else "float32",
            "device": kind,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "seconds": arguments.seconds,
            "note": arguments.note,
        }
        for widening in widenings:
            try:
                _measure(widening, names, variants, on, arguments, rows, left_out)
            except torch.OutOfMemoryError:  # each fits, but not beside all others
                left_out.append(f"k = {widening}: left out, the networks don't fit beside another.")
            if arguments.out is not None and rows:  # what is measured stays, whatever comes next
                conclusions = [*why_slower(rows), *left_out]
                result.write(arguments.out, result.make("networks", rows, settings, conclusions))
    finally:
        torch.set_num_threads(threads)
    if not rows:
        raise ValueError(f"--batch ({on.batch}): nothing fits the memory: give a smaller one")
    _say(f"\n{table(rows)}\n")
    _say("\n".join([*why_slower(rows), *left_out]))
    return 0


def table(rows: Sequence[Row]) -> str:
    """A network a line, in Markdown: its images/s as ratios to torchvision's resnet50.

    That of the first variant measured, the column where its own line says 1. Ratios are taken
    within a repeat: median (least - most). Where a network lacks the variant that the last columns
    are of, they are of another, which is named.
    """
    variants = [each for each in VARIANTS if any(row.extra.get("variant") == each for row in rows)]
    titles = ["network", "k", "parameters", "GMAC", *variants]
    titles += ["at equal GMACs", "TFLOP/s", "of the peak", "MB an image"]
    lines = [titles, ["---"] * len(titles)]
    for group in dict.fromkeys(row.group for row in rows):
        for name in NETWORKS:
            if found := _of(rows, group, name):
                lines.append(_line(rows, found, variants))
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


def at_equal_gmacs(rows: Sequence[Row], row: Row) -> list[float]:
    """TFLOP/s as shares of those of torchvision's resnet50, of the same variant; one a repeat."""
    base = _of(rows, row.group, REFERENCE)[str(row.extra["variant"])]
    return _ratios(_teraflops(row), _teraflops(base))


# ---- Measuring ----------------------------------------------------------------------------------


def _measure(
    widening: int,
    names: Sequence[str],
    variants: Sequence[Variant],
    on: Setting,
    arguments: argparse.Namespace,
    rows: list[Row],
    left_out: list[str],
) -> None:
    """All of one k by turns; adds what came out to `rows`, and to `left_out` what did not fit."""
    group = f"k = {widening}"
    peak, flops = network_step.matmul(on)
    contenders = [peak]
    extras: dict[str, dict[str, float | int | str | bool | None]] = {}
    for name in names:
        count = network_step.counts(name, widening, on.side)
        for variant in variants:
            if variant == "compiled" and not NETWORKS[name].compiles:
                continue
            label = f"{name}, {variant}"
            is_main = variant == _main(variants) and variant != "compiled"
            try:
                stepper, found = _alone(name, widening, variant, on, is_main=is_main)
            except (torch.OutOfMemoryError, TorchDynamoException) as error:
                fits = not isinstance(error, torch.OutOfMemoryError)
                why = "torch.compile fails" if fits else f"{on.batch} images don't fit the memory"
                if name == REFERENCE:
                    raise ValueError(
                        f"--batch ({on.batch}), --variants: {NETWORKS[name].title}, {variant}: "
                        f"{why}: give a smaller batch, or leave the variant out"
                    ) from error
                left_out.append(f"{group}, {label}: left out, {why}.")
                continue
            _say(f"{group}, {label}: first step {found['first_step_s']:.1f} s")
            contenders.append(network_step.contender(label, stepper))
            extras[label] = {
                "network": name,
                "variant": variant,
                "widening": widening,
                "parameters": count.parameters,
                "forward_gmac": count.forward_macs / 1e9,
                "training_gflop": count.training_flops / 1e9,
                **found,
            }
    measured = method.alternate(
        contenders, repeats=arguments.repeats, seconds=arguments.seconds, say=_say
    )
    speed = [rate * flops / 1e12 for rate in measured[MATMUL].rates]
    rows.append(Row(name=MATMUL, group=group, unit="TFLOP/s", values=speed))
    rows += [method.row(label, group, measured[label], extra) for label, extra in extras.items()]
    torch.compiler.reset()  # what is compiled is kept for no more than eight networks of a class


def _alone(
    name: str, widening: int, variant: Variant, on: Setting, *, is_main: bool
) -> tuple[Stepper, dict[str, float]]:
    """A network, and what is measured of it alone: its first step; memory and kinds of work."""
    stepper = Stepper(name, widening, variant, on)
    began = time.perf_counter()
    stepper.step()
    found = {"first_step_s": time.perf_counter() - began}
    if is_main:
        memory = stepper.activations()
        found |= {
            "activations_kept_mb": memory.kept / 1e6 / on.batch,
            PEAK: memory.peak / 1e6 / on.batch,
            **{f"{kind}_ms": took for kind, took in network_step.parts(stepper).items()},
        }
    return stepper, found


# ---- Telling ------------------------------------------------------------------------------------


def _of(rows: Sequence[Row], group: str, name: str) -> dict[str, Row]:
    """A network's rows by variant."""
    return {
        str(row.extra["variant"]): row
        for row in rows
        if row.group == group and row.extra.get("network") == name and "variant" in row.extra
    }


def _main(variants: Sequence[str]) -> str:
    """The one that stands for all: as fastssl/train.py trains, but for what it compiles."""
    return "channels-last" if "channels-last" in variants else variants[0]


def _line(rows: Sequence[Row], found: dict[str, Row], variants: Sequence[str]) -> list[str]:
    row = found[_main(list(found))]
    other = "" if row.extra["variant"] == _main(variants) else f", {row.extra['variant']}"
    first = next(iter(_of(rows, row.group, REFERENCE).values()))
    cells = [
        NETWORKS[str(row.extra["network"])].title,
        f"{row.extra['widening']}" if row.extra["network"] != REFERENCE else "",
        f"{_number(row, 'parameters') / 1e6:.1f} M",
        result.number(_number(row, "forward_gmac")),
    ]
    for variant in variants:
        there = variant in found
        ratios = _ratios(found[variant].values, first.values) if there else []
        cells.append(result.spread(ratios) if there else "")
    speed = statistics.median(_teraflops(row))
    peak = next(each for each in rows if each.group == row.group and each.name == MATMUL)
    cells += [
        result.spread(at_equal_gmacs(rows, row)) + other,
        result.number(speed),
        f"{statistics.median(_ratios(_teraflops(row), peak.values)):.0%}",
        result.number(_number(row, PEAK)) if PEAK in row.extra else "",
    ]
    return cells


def _teraflops(row: Row) -> list[float]:
    return [rate * _number(row, "training_gflop") / 1000 for rate in row.values]


def why_slower(rows: Sequence[Row]) -> list[str]:
    """A sentence for each network that does fewer FLOP/s than torchvision's: where its time goes.

    Milliseconds are of a GMAC of the forward pass, forward and backward together, by the profiler.
    """
    said = []
    for row in rows:
        if "convolution_ms" not in row.extra or row.extra["network"] == REFERENCE:
            continue
        ratio = statistics.median(at_equal_gmacs(rows, row))
        if ratio >= SLOW:
            continue
        base = _of(rows, row.group, REFERENCE)[str(row.extra["variant"])]
        kinds = [*network_step.KINDS, "other"]
        here, there = ({kind: _a_gmac(each, kind) for kind in kinds} for each in (row, base))
        more = sorted(kinds, key=lambda kind: there[kind] - here[kind])[:3]
        parts = ", ".join(
            f"{kind} {result.number(here[kind])} ms ({result.number(there[kind])})" for kind in more
        )
        title = NETWORKS[str(row.extra["network"])].title
        said.append(
            f"{title}, {row.group}, {row.extra['variant']}: {ratio:.2f} of the speed of"
            f" torchvision's resnet50 at equal GMACs; a GMAC takes"
            f" {result.number(sum(here.values()))} ms (torchvision's:"
            f" {result.number(sum(there.values()))}), most of the more in {parts}."
        )
    return said


def _a_gmac(row: Row, kind: str) -> float:
    """Milliseconds of one kind of work."""
    return _number(row, f"{kind}_ms") / _number(row, "forward_gmac")


def _ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _number(row: Row, key: str) -> float:
    value = row.extra[key]
    assert isinstance(value, int | float), key
    return value


# ---- What is asked for --------------------------------------------------------------------------


def _names(asked: Sequence[str]) -> list[str]:
    """In the order of NETWORKS, torchvision's always among them."""
    for name in asked:
        if name not in NETWORKS:
            near = difflib.get_close_matches(name, NETWORKS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NETWORKS)}"
            raise ValueError(f"no network {name!r}; {remedy}")
    return [name for name in NETWORKS if not asked or name in asked or name == REFERENCE]


def _variants(text: str) -> list[Variant]:
    asked = [each for each in text.split(",") if each]
    if not asked or not set(asked) <= set(VARIANTS):
        raise ValueError(f"--variants ({text}) must be one or more of {','.join(VARIANTS)}")
    compiler = os.environ.get("CXX", "g++")
    if "compiled" in asked and shutil.which(compiler) is None:
        raise ValueError(
            f"--variants ({text}): torch.compile needs a C++ compiler, and there is no {compiler}: "
            "install one, or leave compiled out"
        )
    return [each for each in VARIANTS if each in asked]


def _widenings(text: str) -> list[int]:
    try:
        widenings = [int(each) for each in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--widenings ({text}) must be whole numbers: 4,8,12,16") from error
    if min(widenings) < 1:
        raise ValueError(f"--widenings ({text}) must be at least 1; K19's are 4,8,12,16")
    return list(dict.fromkeys(widenings))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command("networks")
