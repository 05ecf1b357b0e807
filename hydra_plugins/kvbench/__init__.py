"""Hydra plug-ins of kvbench; Hydra looks for plug-ins in the namespace `hydra_plugins` only."""
