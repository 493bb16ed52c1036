"""Readers: files, folders and hubs to examples; `shared.data.sources` picks one by data.name."""
