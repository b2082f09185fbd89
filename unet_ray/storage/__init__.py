"""Bytes that survive a kill: places, the records of a run, and the OME-Zarr store.

Knows what lies at a path, who may write there, and which tiles are committed. Does not know the
voxels of an input, networks, or who runs the tiles.
"""
