"""The U-Net: its layers, its arithmetic, its model file, and one tile through it.

Knows tensors and what they cost. Does not know files of volumes, or Ray.
"""
