"""Planted faults that bisect must name."""
