"""The version, apart from everything that needs torch."""

__version__ = "0.1.0"
