"""What `benchmarks/quality.py` trains and measures."""
