"""Integer geometry: boxes of voxels, mirrored indices, context, tiles and plans.

Knows how to cut a volume into tiles that give the same voxels as the whole volume. Does not know
files, torch or Ray.
"""
