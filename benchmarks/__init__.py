"""Benchmarks: what the project is measured against, side by side in one run. Nothing here is needed to train."""
