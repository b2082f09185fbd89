"""Training: turns labelled volumes into a model, on one machine or with Ray Train.

Knows patches, weight maps, augmentation, checkpoints and validation. Does not know segmentation
runs, their tiles, or output stores.
"""
