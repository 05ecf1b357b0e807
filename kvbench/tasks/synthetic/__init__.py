"""Tasks that are made up on the spot: no download, any length, gold answers known exactly.

Prompts depend on a task's parameters and seed alone, never on a tokenizer, so their length is set in characters: a
requested number of tokens times a fixed number of characters per token (see `filler.py`). The engine records the true
token count of every sample.
"""
