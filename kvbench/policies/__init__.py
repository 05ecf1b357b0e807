"""Compression methods: one file each, one contract (`kvbench.policies.base`)."""
