"""Aggregation rules: many updates to one, on plain arrays."""
