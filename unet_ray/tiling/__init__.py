"""Whole numbers: boxes of voxels, mirrored indices, context, tiles and plans.

Knows how a volume is cut into tiles that give the same voxels as the whole. Does not know files,
torch or Ray.
"""
