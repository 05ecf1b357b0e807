"""Slow fp32 twins of the methods, in the papers' symbols."""
