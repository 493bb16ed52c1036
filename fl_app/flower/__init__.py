"""Flower's side: everything that imports flwr, and nothing else does."""
