"""The U-Net: its layers, its arithmetic, its model file, and the prediction of one tile.

Handles tensors and their cost in time and memory. Independent of volume files and of Ray.
"""
