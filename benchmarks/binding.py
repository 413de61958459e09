"""Which stage binds a run, and what would move it: rates in, ratios and sentences out.

Without a GPU the loader and the step use the same cores, so their times add up: the loop is to be
expected at E = 1 / (1 / L + 1 / G), if both keep all cores busy. With a GPU they overlap, and the
loop is to be expected at min(L, G).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.method import Measured
from benchmarks.result import number, spread

EVEN = 1.15  # loader and step within this factor of one another: neither binds alone
SLOW = 0.05  # part of a rate that is worth a word
FULL = 0.7  # of the loader's threads busy, from which on more cores may help beside a GPU
PACK = "python -m fastssl.data pack"


@dataclass(frozen=True)
class Setting:
    """What was measured where."""

    gpu: bool  # the graph and the step run there
    threads: int  # of the loader
    cores: int  # allowed
    limit: str | None = None  # what decoded for the limit; None: nobody
    pixels: bool = False  # the store holds pixels: nothing is decoded
    together: bool = False  # images lie in a store that is mapped: the loader copies no bytes
    region: bool = False  # no more of an image is decoded than the graph's crop
    decoder: Literal["auto", "cpu"] = "auto"  # loader.decoder


def derived(measured: Mapping[str, Measured], *, gpu: bool) -> dict[str, list[float]]:
    """Ratios within each repeat of one `method.alternate`.

    Args:
        measured: read, graph, loader, step and end_to_end; decode where something is, and
            interference and decode_limit where they were measured.
        gpu: whether loader and step overlap.
    """
    repeats = [
        dict(zip(measured, rates, strict=True))
        for rates in zip(*(stage.rates for stage in measured.values()), strict=True)
    ]
    expected = [_expected(r["loader"], r["step"], gpu) for r in repeats]  # images/s
    made: dict[str, list[float]] = {
        "expected": expected,
        "loop_to_expected": [r["end_to_end"] / e for r, e in zip(repeats, expected, strict=True)],
        "stall": [1 - r["end_to_end"] / r["step"] for r in repeats],
        "overlap": [r["end_to_end"] / min(r["loader"], r["step"]) for r in repeats],
        "loader_to_graph": [r["loader"] / r["graph"] for r in repeats],
        "loader_to_read": [r["loader"] / r["read"] for r in repeats],
    }
    if "decode" in measured:
        made["loader_to_decode"] = [r["loader"] / r["decode"] for r in repeats]
    if "interference" in measured:
        made["interference"] = [1 - r["interference"] / r["step"] for r in repeats]
    if "decode_limit" in measured:
        made["decode_to_limit"] = [r["decode"] / r["decode_limit"] for r in repeats]
        made["loader_to_limit"] = [r["loader"] / r["decode_limit"] for r in repeats]
    return made


def conclusions(measured: Mapping[str, Measured], setting: Setting) -> list[str]:
    """Sentences with numbers: which stage binds, then the reasons; images/s are medians.

    Args:
        measured: as for `derived`.
        setting: what was measured where.
    """
    ratios = derived(measured, gpu=setting.gpu)
    rate = {name: statistics.median(stage.rates) for name, stage in measured.items()}
    cpu = {name: statistics.median(stage.cpu_ms) for name, stage in measured.items()}
    middle = {name: statistics.median(each) for name, each in ratios.items()}
    said = [_binding(rate, middle, cpu, setting), _loader(rate, cpu, setting)]
    if "decode_limit" in measured:
        said.append(_limit(rate, ratios, setting))
    said.append(_loop(rate, ratios, setting))
    if "interference" in measured:
        said.append(_interference(rate, middle, setting))
    said.append(
        f"Loader overhead: L is {_spread(ratios['loader_to_graph'])} of the bare graph's"
        " pipe.run()."
    )
    return said


def cold(read_cold: Sequence[float], loader: Sequence[float]) -> str:
    """A sentence on an epoch whose images are not in the page cache: images/s, one a repeat."""
    from_disk, warm = statistics.median(read_cold), statistics.median(loader)
    if from_disk < warm:
        return (
            f"From the disk {spread(read_cold)} images/s can be read, fewer than the loader makes:"
            " while images are not in the page cache, as in a first epoch or with more data than"
            " memory, storage binds the loader, and faster storage would move it."
        )
    return (
        f"From the disk, not the page cache, {spread(read_cold)} images/s can be read:"
        f" {_times(from_disk / warm)} what the loader takes."
    )


def _expected(loader: float, step: float, gpu: bool) -> float:
    return min(loader, step) if gpu else 1 / (1 / loader + 1 / step)


def _binding(
    rate: Mapping[str, float], middle: Mapping[str, float], cpu: Mapping[str, float], on: Setting
) -> str:
    """The one sentence."""
    loader, step = rate["loader"], rate["step"]
    rates = f"G {number(step)} images/s, L {number(loader)}"
    if loader > EVEN * step:
        spare = f"the loader has {_times(loader / step)} to spare"
        if on.gpu:
            return (
                f"The step binds ({rates}): {spare}; a faster GPU, a smaller network or a lower"
                " precision would move it, a faster loader would not."
            )
        share = middle["expected"] / loader
        return (
            f"The step binds ({rates}): {spare}; a GPU or a smaller network would move it, a faster"
            f" loader by no more than its part of the cores' time, {share:.1%}."
        )
    remedy = _remedy(rate, middle, cpu, on)
    if step > EVEN * loader:
        why = f"of the cores' time it takes {middle['expected'] / loader:.0%}"
        if on.gpu:
            why = f"the GPU waits {1 - loader / step:.0%} of the time"
        return f"The loader binds ({rates}): {why}; {remedy} would move it."
    return (
        f"Loader and step are even ({rates}): a faster one alone moves little; {remedy} would speed"
        " the loader, a smaller network the step."
    )


def _remedy(
    rate: Mapping[str, float], middle: Mapping[str, float], cpu: Mapping[str, float], on: Setting
) -> str:
    """What makes the loader faster, by what its time goes to."""
    more = _more_cores(rate, cpu, on)
    smaller = "smaller crops and fewer changes of colour"
    if on.gpu and not more:
        smaller += f" (the GPU's part binds: {_busy(rate, cpu, on)})"
    if on.pixels:
        return _either(*more, smaller)
    if middle["loader_to_read"] > 0.5 and not on.together:
        return f"a tar store in place of reading file by file from the page cache ({PACK})"
    # Where only a part of each image is decoded, this is the most that decoding can take.
    decoding = middle["loader_to_decode"] if on.gpu else cpu["decode"] / cpu["loader"]
    if decoding < 0.5:
        return _either(*more, smaller)
    pack = f"a store of smaller images ({PACK} --short-side 292)"
    if on.together:
        pack = f"a store of pixels ({PACK} --form raw)"
    if not on.gpu:
        return _either(pack, *more, "a GPU that decodes")
    if on.decoder == "cpu":
        return _either(pack, *more, "decoding on the GPU (loader.decoder=auto)")
    return _either(pack, *more, "other settings of the decoder (python -m benchmarks tune)")


def _more_cores(rate: Mapping[str, float], cpu: Mapping[str, float], on: Setting) -> list[str]:
    """A remedy, or none where the threads that there are have time left."""
    # Waiting for the GPU takes CPU time, too: few busy cores tell more than many.
    if on.gpu and _cores_busy(rate, cpu) < FULL * on.threads:
        return []
    if on.threads < on.cores:
        return [f"all {on.cores} cores in place of {_count(on.threads, 'thread')} (loader.threads)"]
    return ["more cores"]


def _loader(rate: Mapping[str, float], cpu: Mapping[str, float], on: Setting) -> str:
    """What the loader's time goes to."""
    alone = [name for name in ("read", "decode", "graph") if name in rate]
    rates = ", ".join(f"{name} {number(rate[name])}" for name in (*alone, "loader"))
    rates = f"images/s: {rates}"
    if on.gpu:  # threads, decoder and GPU work on different batches at once: nothing to subtract
        if on.region:
            rates += "; decode is of whole images, where the graph decodes only its crop"
        return f"Of what runs side by side in the loader the slowest sets the pace ({rates})."
    whole = cpu["loader"]
    begins = f"An image takes {number(whole)} ms of CPU in the loader"
    busy = _busy(rate, cpu, on)
    if on.pixels:
        return (
            f"{begins}, the graph's alone: pixels are stored, nothing is decoded; {busy} ({rates})."
        )
    reading = 0.0 if on.together else min(cpu["read"], whole)
    if on.region:
        read = "" if on.together else f", {reading / whole:.0%} of it for reading"
        return (
            f"{begins}{read}; only what the crop needs is decoded, so that no share of decoding can"
            f" be told (whole images, alone: {number(cpu['decode'])} ms); {busy} ({rates})."
        )
    decoding = min(max(0.0, cpu["decode"] - reading), whole - reading)
    rest = whole - reading - decoding
    free, read = "", "" if on.together else f"reading {reading / whole:.0%}, "
    if rest > SLOW * whole:
        bound = rate["loader"] * whole / (whole - decoding)
        free = f"; were decoding free, L would be {number(bound)}"
    return (
        f"{begins}: {read}decoding {decoding / whole:.0%}, the rest of the graph"
        f" {rest / whole:.0%}; {busy}{free} ({rates})."
    )


def _limit(rate: Mapping[str, float], ratios: Mapping[str, Sequence[float]], on: Setting) -> str:
    """On the packages that decode as fast as the cores can; a GPU's decoders are no part of it."""
    name, beside = "decode limit", ""
    if on.gpu:
        name, beside = "CPU decode limit", "; a GPU's decoders may pass it"
    return (
        f"The {name} of this machine is {number(rate['decode_limit'])} images/s (libjpeg-turbo by"
        f" {on.limit}, {_count(on.cores, 'thread')}, whole images from memory{beside}):"
        f" decoding reaches {_spread(ratios['decode_to_limit'])} of it, the loader"
        f" {_spread(ratios['loader_to_limit'])}."
    )


def _loop(rate: Mapping[str, float], ratios: Mapping[str, Sequence[float]], on: Setting) -> str:
    loop = number(rate["end_to_end"])
    if on.gpu:
        stall = max(0.0, statistics.median(ratios["stall"]))
        return (
            f"In the loop E is {loop} images/s: overlap {_spread(ratios['overlap'])} of the slower"
            f" of L and G, stall {stall:.1%}."
        )
    return (
        f"In the loop E is {loop} images/s: loader and step share {on.cores} cores, so that"
        f" 1 / (1/L + 1/G) = {number(statistics.median(ratios['expected']))} is to be expected, of"
        f" which it is {_spread(ratios['loop_to_expected'])} (stall"
        f" {max(0.0, statistics.median(ratios['stall'])):.1%}, overlap"
        f" {_spread(ratios['overlap'])})."
    )


def _interference(rate: Mapping[str, float], middle: Mapping[str, float], on: Setting) -> str:
    lost = middle["interference"]
    found = f"G is then {number(rate['interference'])} images/s"
    if lost < SLOW:
        return f"A loader that runs unconsumed beside the step leaves it its speed: {found}."
    why = "both use the cores, and a loop never asks for so many batches"
    if on.gpu:
        why = "both use the GPU"
        if on.decoder == "auto" and not on.pixels:
            why += ", and loader.decoder=cpu would take decoding off it"
    return (
        f"A loader that runs as fast as it can beside the step, unconsumed, takes {lost:.0%} of its"
        f" speed ({found}): {why}."
    )


def _spread(values: Sequence[float]) -> str:
    """Median (least - most) of a ratio."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} - {max(values):.2f})"


def _cores_busy(rate: Mapping[str, float], cpu: Mapping[str, float]) -> float:
    return rate["loader"] * cpu["loader"] / 1000


def _busy(rate: Mapping[str, float], cpu: Mapping[str, float], on: Setting) -> str:
    return f"{_cores_busy(rate, cpu):.1f} of {on.cores} cores are busy"


def _either(*remedies: str) -> str:
    *others, last = remedies
    return f"{', '.join(others)} or {last}" if others else last


def _count(count: int, name: str) -> str:
    return f"{count} {name}" + ("s" if count != 1 else "")


def _times(factor: float) -> str:
    return f"{factor:.0f} times" if factor >= 10 else f"{factor:.1f} times"
