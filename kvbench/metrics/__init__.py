"""Official scorers as pure functions of strings, and fidelity to the full cache."""
