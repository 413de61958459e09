"""Readers: one file a way to store images. A recipe names a file here (or any importable module).

A reader file offers
    Options                               a frozen dataclass: what a recipe may set under `data`;
                                          `root`, `bad`, `limit`, `fraction`, `per_class`,
                                          `subset_seed` and `quarantine` among it
    list_samples(options, *, cache, say)  every image as a row, with its class and its state: the
                                          `Samples` described in `pipelines.readers.folder`; with
                                          `chunks`, where images that lie together are best read
                                          together (`pipelines.readers.tar`)
    source(samples, rows, decoding)       inside a DALI graph: (image, index); rows(step) tells
                                          which rows, int64 [batch], to read for a step; the image
                                          is one of `pipelines.images`, to be decoded as `decoding`
                                          says
A row stands for the same image in every run. Wrong input is a ValueError, before training, that
names the place, what was found and the remedy. Nothing here imports torch or fastssl.
"""

SECOND = ("val", "validation", "test")  # what the split beside train/ may be called; the first wins
