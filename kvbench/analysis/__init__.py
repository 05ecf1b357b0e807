"""The KVMerger paper's observations about keys, ratios and attention, measured on any model."""
