"""Slow fp32 twins of the policies, in loops and the papers' symbols; tests compare the fast versions with them."""
