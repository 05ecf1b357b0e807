"""Storage for the compressed caches of all rows of a decode batch."""
