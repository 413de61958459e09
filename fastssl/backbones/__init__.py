"""Backbones: files of networks that turn images into features, named as `backbone.use`.

A file here offers `Options`, a frozen keyword-only dataclass whose `__post_init__` refuses wrong
values, and `backbone(options) -> nn.Module`, initialised from torch's global generator, with
    dim: int, the length of a feature vector;
    normalization: (mean, std), three floats each, for images in 0 ... 1;
    forward(x) -> [B, dim] and stages(x) -> dict[str, Tensor], every depth worth probing in order,
        the last being what forward returns.
x is uint8 [B, 3, H, W] in 0 ... 255, normalised inside in float32, or a float tensor that is
normalised already (fastssl/pixels.py does both); channels-last memory kept. Any size that is not
too small for the strides, which is refused with a ValueError that says the least; a network of one
size only offers `image_size: int`. tests/test_backbones.py checks all.

Options that several have are spelled alike: widening, representation, stem, patch_mode, last_relu,
activation_checkpointing (fastssl/recompute.py), image_size.
"""
