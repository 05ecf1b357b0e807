"""Prefill once, fork into arms, decode all arms: the fused engine and its plain oracle."""
