"""Rounders: which code each weight gets."""
