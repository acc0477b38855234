"""Triton kernels of the contrastive loss and their launch choices; the mathematics is in README.md beside this file."""
