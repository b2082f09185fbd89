"""One run of `segment`: settings, plan, preparation, execution and verification.

Knows how volume, model and store become the stages that the engine runs. Does not know drawing or
scores.
"""
