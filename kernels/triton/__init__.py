"""Device kernels in Triton; importing this package needs nothing, ``topk`` needs torch and triton."""
