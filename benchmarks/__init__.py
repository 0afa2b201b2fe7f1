"""Measurements against sentence-transformers: `python benchmarks/run.py`."""
