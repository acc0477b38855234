"""What a figure was measured on: every row of results carries it."""

from rcl_fast.train.provenance import describe

__all__ = ["describe"]
