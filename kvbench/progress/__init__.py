"""How far runs are, from what they have written alone: `python -m kvbench.progress`."""
