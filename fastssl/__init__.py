"""Self-supervised pretraining on images: DALI pipelines, PyTorch objectives, one recipe a run."""

__version__ = "0.1.0"
