"""Outlier handlers: how the layers of an input group are rewritten before they are rounded."""
