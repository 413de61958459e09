"""Faster R-CNN on a trained backbone: detector, boxes, data, training, scores."""
