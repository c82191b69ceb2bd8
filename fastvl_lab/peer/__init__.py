"""Engines that are not ours, measured the same way: a file each, which registers them with `engine.engine`."""
