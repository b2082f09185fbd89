"""Scores of a prediction against the ground truth.

Handles label maps and probability maps, as arrays and as files. Independent of training and runs.
"""
