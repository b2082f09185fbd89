"""Inputs as arrays (c, z, y, x) that are read by windows, with grey values, masks and phantoms.

Knows the formats that other tools write. Does not know tiles of a run, networks or results.
"""
