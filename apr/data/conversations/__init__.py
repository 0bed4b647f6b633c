"""Conversations as training data: examples, rendering, packing."""
