"""Where weights come from: a folder, a hub id, a built-in tiny checkpoint, or random weights of a published geometry."""

from fastvl_lab.checkpoint.loading import Checkpoint, load, resolve_device

__all__ = ["Checkpoint", "load", "resolve_device"]
