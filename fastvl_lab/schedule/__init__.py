"""Slot 7: which requests share a step."""
