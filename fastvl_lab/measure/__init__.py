"""Repeat, compare and keep: every number with its samples, its interval and its parity check."""
