"""Version of apr."""

__version__ = "0.1.0"
