"""Base models: find, load, name their layers, read their weights."""
