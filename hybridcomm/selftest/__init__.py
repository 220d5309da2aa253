"""Checks to run on one's own machine: ``python -m hybridcomm.selftest``, device kernels and the GPU engine."""
