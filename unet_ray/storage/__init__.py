"""Files that survive a kill: paths and objects, the records of a run, and the OME-Zarr store.

Knows what exists at a path, who may write there, and which tiles are committed. Does not know
input voxels, networks or engines.
"""
