"""Measure dimr_fast: each operator, the whole model, a GPU, and what the architecture is worth.

Every command is a module: `python -m benchmarks.<package>.<module>`, from the root of a checkout.
"""
