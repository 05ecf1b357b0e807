"""Formats that results are exported to; `python -m kvbench.export` is the command."""
