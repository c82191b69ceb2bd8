"""Second copies of weights in the layout that a CPU's products read fastest, one of each weight for all recipes."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch

from fastvl_lab.checkpoint.memory import available_bytes, gigabytes
from fastvl_lab.errors import DeviceError
from fastvl_lab.kernels.packed import pack, packed_bytes


class PackedWeights:
    """The packed copies of a checkpoint's weights: made when a recipe first asks for one, let go with the last recipe that has it.

    Who keeps a copy keeps its weight too, so that none is taken for that of another in its place.
    """

    def __init__(self) -> None:
        self._of: WeakValueDictionary[object, torch.Tensor] = WeakValueDictionary()

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The copy of a weight [out, in]; raises `DeviceError` where there is no memory for it."""
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        packed = self._of.get(key)
        if packed is None:
            free = available_bytes(weight.device)
            if free is not None and weight.nbytes > free:
                raise DeviceError(
                    f"packed weights take memory a second time: {gigabytes(self.n_bytes)} so far, {gigabytes(weight.nbytes)} for "
                    f"the next, and {gigabytes(free)} are free; choose 'plain' for vit.weights and attention.weights"
                )
            packed = self._of[key] = pack(weight)
        return packed

    @property
    def n_bytes(self) -> int:
        """What is held now."""
        return sum(map(packed_bytes, self._of.values()))
