"""Append-only records of what was measured, and the environment it was measured in."""
