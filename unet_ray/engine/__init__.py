"""Runs a stage to its end: attempts at single tiles, threads, Ray actors and the cluster.

Knows tile numbers, failures and receipts. Does not know what a tile contains, volumes or
networks.
"""
