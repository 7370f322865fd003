"""Benchmarks of training on several processes."""
