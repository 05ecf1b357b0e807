"""Compression methods, one a file, and what they have in common."""
