"""The decoder both families share: merge, prefill, sample, and one decode step."""
