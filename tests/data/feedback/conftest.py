"""Every test of feedback can make rows of events."""

from thumbs import make

__all__ = ["make"]
