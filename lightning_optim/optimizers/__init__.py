"""The algorithms we own, pure torch, one per file."""
