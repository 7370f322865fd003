"""Helpers that every other package of `benchmarks` may import; they import none of the others.

They load the standard library only, so that a report survives a torch that does not import.
"""
