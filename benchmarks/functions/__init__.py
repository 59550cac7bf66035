"""What `benchmarks/functions.py` trains and measures."""
