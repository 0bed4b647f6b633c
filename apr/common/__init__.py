"""Foundations that know nothing of models: errors, files, atomic writes, options, the host."""
