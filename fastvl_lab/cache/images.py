"""Visual tokens kept between requests, found by the content of the image that they were made of."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastvl_lab.request import VisionTokens


def split(vision: VisionTokens, lengths: Sequence[int]) -> list[VisionTokens]:
    """Pieces of that many visual tokens each, as views."""
    pieces = zip(*(part.split(list(lengths)) for part in vision.parts), strict=True)
    return [VisionTokens(embeds=embeds, deepstack=tuple(deepstack)) for embeds, *deepstack in pieces]


def join(pieces: Sequence[VisionTokens]) -> VisionTokens:
    """One after another; a single piece is returned as it is."""
    if len(pieces) == 1:
        return pieces[0]
    embeds, *deepstack = (torch.cat(parts) for parts in zip(*(piece.parts for piece in pieces), strict=True))
    return VisionTokens(embeds=embeds, deepstack=tuple(deepstack))


def image_digest(made_by: str, size: str, content: bytes) -> bytes:
    """What stands for an image: all that decides what becomes of it, its resized size, and its content (blake2b, 256 bits)."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (made_by.encode(), size.encode(), content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """One image's visual tokens, and what they weigh."""

    vision: VisionTokens
    n_bytes: int


class ImageStore:
    """The visual tokens of the images met last, bounded in bytes; the one unused for longest goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: bytes) -> Kept | None:
        """What is kept of an image, now the one used last."""
        kept = self._kept.get(digest)
        if kept is not None:
            self._kept.move_to_end(digest)
        return kept

    def put(self, digest: bytes, vision: VisionTokens) -> None:
        """Keep an image's visual tokens, copied out of what they were part of; what is larger than the store is not kept."""
        n_bytes = sum(part.numel() * part.element_size() for part in vision.parts)
        if n_bytes > self.max_bytes or digest in self._kept:
            return
        while self.n_bytes + n_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.n_bytes -= oldest.n_bytes
        embeds, *deepstack = (part.clone() for part in vision.parts)
        self._kept[digest] = Kept(vision=VisionTokens(embeds=embeds, deepstack=tuple(deepstack)), n_bytes=n_bytes)
        self.n_bytes += n_bytes
