"""Input volumes as arrays (c, z, y, x) read by windows; intensities, masks and phantoms.

Knows the file formats of other tools. Does not know networks, segmentation runs or results.
"""
