"""Any stage run to its end: one try of a tile, threads, Ray actors and the cluster.

Knows tile numbers, failures and receipts. Does not know what a tile is about, volumes or
networks.
"""
