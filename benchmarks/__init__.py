"""Benchmarks: the project and others, measured side by side in one run.

Nothing here is needed to train.
"""
