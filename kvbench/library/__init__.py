"""`kvbench.compress`: any policy as the cache of `model.generate`, for people who want the methods, not the tables."""
