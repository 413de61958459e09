"""What an evaluation is given: a backbone with weights, labelled images, features, the journal."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fastssl import distributed, features, labelled, loader, starting
from fastssl.config import Part
from fastssl.features import Features
from fastssl.features import Options as FeatureOptions
from fastssl.labelled import Split
from fastssl.trained import Trained

Cell = str | float | int | None
READER = "pipelines.readers.folder"  # where data.use is not given


@dataclass
class Table:
    """A result to print: one row or more of one RUN, joined with those of the others.

    A float is a fraction (accuracy, mAP) and shown in per cent with one decimal, but in columns
    named in `plain`, where it is shown as it is with four digits. An int or str is shown as it is,
    None as a dash. A first column `run` is put before rows that don't have it.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    plain: tuple[str, ...] = ()


@dataclass
class Task:
    """One RUN to evaluate."""

    trained: Trained
    accelerator: Accelerator
    reader: Part  # section data; its root is the folder around train/ and val/ (or another layout)
    demo: bool  # no data.root was given: these are the built-in images
    graph: Part  # section evaluation: the run's own, with what the command line changed
    loading: loader.Options
    features: FeatureOptions
    cache: Path
    out: Path  # folder for pictures and tables; make it before writing
    seed: int
    say: Callable[[str], None]  # silent on all processes but the first
    runs: tuple[Trained, ...] = ()  # all of the command, this one among them
    outs: tuple[Path, ...] = ()  # the folder of each of them, as `out`
    graphs: tuple[Part, ...] = ()  # and the graph of each, as `graph`
    _splits: tuple[Split, Split, tuple[str, ...]] | None = None
    _features: dict[str, Features] = field(default_factory=dict)

    def splits(self) -> tuple[Split, Split, tuple[str, ...]]:
        """train, val and the names of the classes; listed once.

        Raises:
            ValueError: see `labelled.splits`.
        """
        if self._splits is None:
            with starting.one_at_a_time(self.cache):
                self._splits = labelled.splits(
                    self.reader.module, self.reader.options, cache=self.cache, say=self.say
                )
        return self._splits

    def extract(
        self,
        split: Split,
        options: FeatureOptions | None = None,
        *,
        key: str = "features.stages",
    ) -> Features:
        """The features of a split, by the graph of the task; all processes call it together.

        Args:
            split: of `splits()`, or another with the same reader.
            options: others than the section `features`, such as fewer stages.
            key: what the user calls the stages, where an unknown one is to be blamed.

        Raises:
            ValueError: see `features.extract`.
        """
        options = self.features if options is None else options
        known = f"{split.name} {split.samples.fingerprint} {hash(split.rows.tobytes())} {options}"
        if known not in self._features:
            self._features[known] = features.extract(
                self.trained,
                split,
                self.graph,
                options,
                loading=self.loading,
                accelerator=self.accelerator,
                cache=self.cache,
                say=self.say,
                key=key,
            )
        return self._features[known]

    def log(self, probe: str, values: Mapping[str, Any]) -> None:
        """Adds a probe's line to metrics.jsonl: of the run folder, else of `out`.

        On what it was measured is said in each, `conditions`.
        Where the file can't be written a warning is said, and the result is not lost.

        Args:
            probe: "linear", "knn", ...
            values: plain types: `stage`, `accuracy` or `map` (0 ... 1), and the settings.
        """
        if distributed.rank() != 0:
            return
        folder = self.trained.folder or self.out
        path = folder / "metrics.jsonl"
        line = json.dumps(
            {"step": self.trained.step, "probe": probe, **self.conditions(), **values},
            allow_nan=False,
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._append(path, f"{line}\n".encode())
        except OSError as error:  # the table is printed all the same
            self.say(f"warning: {path} can't be written: {error.strerror or error}")

    def conditions(self) -> dict[str, Any]:
        """On what a probe is measured; flat, so that the report tells lines apart by each of them.

        Of the reader, what differs from its defaults, such as `data_limit`. The words for precision
        are none that the report takes for a result.
        """
        use, options = self.reader.use, self.reader.options
        read = {} if use == READER else {"data_use": use}
        read |= {
            f"data_{each.name}": vars(options)[each.name]
            for each in fields(options)
            if each.name != "root" and vars(options)[each.name] != each.default
        }
        graph = {f"graph_{key}": value for key, value in asdict(self.graph.options).items()}
        mixed = str(self.accelerator.mixed_precision)
        return {
            "data": "built-in images" if self.demo else options.root,
            **read,
            "graph": self.graph.use,
            **graph,
            "seed": self.seed,
            "computed_in": "fp32" if mixed == "no" else mixed,
            "weights": self.trained.weights[:12],
        }

    def _append(self, path: Path, line: bytes) -> None:
        """One write, at the end whoever else writes: never half a line between two of others."""
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            if torn:  # by a full disk: readers stop there
                self.say(f"warning: {path} ends in half a line: nothing is added to it")
            elif os.write(file, line) < len(line):
                raise OSError("the disk is full")
        finally:
            os.close(file)
