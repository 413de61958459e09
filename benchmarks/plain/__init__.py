"""The same tasks without DALI, one file a way to write them: pil, tuned, ffcv.

Each file offers
    dataset(graph, paths, options, *, seed=0) -> torch.utils.data.Dataset
        the task of the graph file `graph` ("pipelines.pirl_jigsaw") on the image files `paths`;
        `options` is an instance of that file's Options, as a recipe sets it. Its length is
        len(paths), and item number row is a dict with exactly the graph's outputs, by name:
            images          uint8 [3, S, S], any strides
            patches, copies uint8 [F, 3, p, p]: `patches` of jigsaws, `views`, rotation's `turned`
            labels          int64 of the graph's shape, but that of a single number is []:
                            `angle` of pirl_rotation [], of rotation [F]; `pair` [N, 2]
            index           int64 []: row
        so that a collated batch has the shapes and types of fastssl.loader.Loader's: [B, ...], and
        [B] for single numbers. Randomness is drawn from torch's and random's global generators,
        which `loader` seeds in each worker; `seed` is only for what is drawn once for the dataset.
        ValueError: a graph it has no version of (the message names graph and file), or an option
        whose value it does not honour (the message names the option and its value).
    loader(dataset, *, batch, workers, pinned=False) -> torch.utils.data.DataLoader
        shuffled, the last short batch left out, workers kept from epoch to epoch and seeded each
        its own (torch's generator and random's); workers=0 works in the calling process; others
        are started by benchmarks.plain.workers. pinned: batches come in page-locked memory, which
        a GPU copies by itself.
ffcv.py runs in an interpreter of its own and says there how it is called; what it puts out is the
same batch.

What is compared is only compared after `benchmarks.gate.check(contender, graph, options, make)`,
where make(paths, options) gives the batch of all `paths`, stacked [B, ...], one of each in any
order: labels must be recoverable from the pixels, and crops, flips and gray drawn as options say.
"""
