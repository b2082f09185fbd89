"""Predictions compared with the truth: what is counted, and how counts become scores.

Knows label maps and probabilities as arrays and files. Does not know training or runs.
"""
