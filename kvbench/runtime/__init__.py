"""One cache, one attention adapter, one model check: observe, fork, decode, and generate for `compress()`."""
