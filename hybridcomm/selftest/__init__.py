"""Checks to run on one's own machine: ``python -m hybridcomm.selftest kernels``."""
