"""Input volumes as arrays (c, z, y, x) read by windows; intensities, masks and phantoms.

Handles the file formats of other tools. Independent of networks, segmentation runs and results.
"""
