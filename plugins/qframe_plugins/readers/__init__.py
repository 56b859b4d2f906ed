"""Checkpoints of other tools: one file, one format."""
