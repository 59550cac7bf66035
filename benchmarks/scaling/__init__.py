"""How memory, bandwidth and caches scale with GPUs and adapters: a model, and what it is held against."""
