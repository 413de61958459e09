"""One process of `python -m benchmarks scale entries`: lists a folder, and tells what it took.

    python -m benchmarks.scale_listing ROOT CACHE check     # or trust; then lines on stdin

It says "ready" and waits for a line twice, before and after it lists, so that several do so at the
same time and hold what they have together. Nothing that a listing needs not is imported.
"""

import json
import sys
import time
from pathlib import Path

from fastssl import order
from pipelines.readers import folder

BATCH = 256


def main(arguments: list[str]) -> None:
    """Lists, and prints a line of JSON: seconds, and bytes an image that this process took more."""
    root, cache, how = arguments
    options = folder.Options(root=root, listing="trust" if how == "trust" else "check")
    before = _memory()
    wait()
    began, cpu = time.perf_counter(), time.process_time()
    samples = folder.list_samples(options, cache=Path(cache), say=lambda _: None)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    count = len(samples.usable)
    order.shuffled(count, 0, 0, 0, 1, min(BATCH, count))
    wait()
    after = _memory()
    each = {key: max(0, value - before[key]) / len(samples) for key, value in after.items()}
    print(json.dumps({"seconds": seconds, "CPU": cpu, **each}), flush=True)
    sys.stdin.readline()


def wait() -> None:
    """Until the parent says that the others are as far."""
    print("ready", flush=True)
    sys.stdin.readline()


def _memory() -> dict[str, int]:
    """Bytes: RSS, its peak, and PSS, in which a page counts in parts where processes share it."""
    keys = {"Rss": "RSS", "Pss": "PSS", "VmHWM": "peak"}
    lines = [
        line.split()
        for file in ("smaps_rollup", "status")
        for line in Path("/proc/self", file).read_text().splitlines()
    ]
    return {
        keys[line[0][:-1]]: 1024 * int(line[1]) for line in lines if line and line[0][:-1] in keys
    }


if __name__ == "__main__":
    main(sys.argv[1:])
