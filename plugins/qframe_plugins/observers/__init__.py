"""Observers: statistics of a layer's inputs."""
