"""Device kernels in CUDA C++, where Triton has no means for what they do: votes, shared counters, a block per warp.

A module says what the source of the same name defines; importing it needs nothing. Regions have a multiple of 16
elements, as padded buckets have, pointers are aligned to 16 bytes, and null stands for a residual that is not there.
"""
