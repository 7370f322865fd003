"""Measure and tune on a GPU; predict kernel times without one."""
