"""Device kernels in Triton; importing this package needs nothing, importing ``topk`` needs torch and triton."""
