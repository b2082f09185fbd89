"""The `segment` workflow: settings, plan, preparation, execution and verification.

Knows how a volume, a model and a store become a stage that the engine runs. Does not know plots, or
scores against a truth.
"""
