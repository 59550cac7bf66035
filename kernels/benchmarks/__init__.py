"""The parts of `kernels/bench.py`. Nothing in `molora_kernels` imports them."""
