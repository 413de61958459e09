"""DALI graphs: one file a pretext task. A recipe names a file here (or any importable module).

A graph file offers
    Options
        a frozen dataclass: what a recipe may set, with the paper's defaults; ValueError from
        __post_init__ for what cannot be; `largest_crop`, the pixels a side images are resized to;
        `classes`, how many values the output `label` takes, 0 where there is none
    graph(encoded, index, options, device) -> dict[str, DataNode]
        from one image as a reader gives it (`pipelines.images`) and its row in the listing (int64
        [1]) to named outputs, `index` among them
Outputs are uint8, HWC or (patches) FHWC, and int64 labels: floats and normalisation belong to the
training device. `device` is "cpu" or "gpu", and the graph is the same: what differs is inside
`pipelines.ops`. All randomness is drawn on the CPU side, so both backends draw the same. Every
label must be recoverable from the pixels by a test. Nothing here imports torch or fastssl.
"""
