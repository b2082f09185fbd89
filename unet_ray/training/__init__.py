"""Labels to a model: the paper's recipe, on one machine or by Ray Train.

Knows patches, weight maps, augmentation, checkpoints and validation. Does not know the tiles of a
run, or stores.
"""
