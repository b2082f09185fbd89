"""Pages and pictures of trainings and stores.

Knows how results are drawn. Does not know how anything was computed.
"""
