"""The version of outsize."""

__version__ = "0.1.0"
