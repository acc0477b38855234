"""What a figure was measured on: every row of results carries it."""

from rcl_fast.provenance import describe

__all__ = ["describe"]
