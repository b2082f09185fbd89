"""Scores of a prediction against the ground truth, and seams of labels without it.

Knows label maps and probability maps, as arrays and as files. Does not know training or runs.
"""
