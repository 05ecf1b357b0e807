"""Sources of samples: synthetic tasks, LongBench, ZeroSCROLLS."""
