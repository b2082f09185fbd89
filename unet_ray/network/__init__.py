"""The U-Net: its layers, its arithmetic, its model file, and the prediction of one tile.

Knows tensors and their cost in time and memory. Does not know volume files or Ray.
"""
