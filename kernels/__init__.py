"""Triton kernels, one file per operator, installed as ``dimr_fast.kernels``."""
