"""Slot 4: what is kept between steps, and between requests.

`bind(...).admit` gives a request its place: room for its keys and values, and what earlier requests left that it can use. Whatever
becomes of the request, `Place.close` gives the room back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fastvl_lab.cache.blocks import Token
from fastvl_lab.cache.concat import ConcatKv, ConcatSequence
from fastvl_lab.cache.images import ImageStore, Kept, image_digest, join, split
from fastvl_lab.cache.memory import BLOCK_SIZE, Memory, Paged
from fastvl_lab.cache.slotted import KvStore, SlottedKv, SlottedSequence
from fastvl_lab.catalogue import Cache
from fastvl_lab.request import Prompt, VisionTokens

# Of each image of a request: what it is resized to, and the bytes that stand for it.
Contents = Callable[[], Iterable[tuple[str, bytes]]]


class Place:
    """One request's place in the caches.

    reused: how many of its prompt's tokens are in the KV cache already. to_make: the numbers of the images whose visual tokens are
    needed and not known. counts: what was found, in words, for the trace.
    """

    def __init__(
        self,
        sequence: ConcatSequence | SlottedSequence,
        prompt: Prompt,
        *,
        images: ImageStore | None = None,
        digests: Sequence[bytes] = (),
        bytes_per_token: int = 0,
    ) -> None:
        self.sequence, self.kv, self.reused = sequence, together([sequence]), sequence.length
        self._prompt, self._images, self._digests = prompt, images, digests
        self._needed = [number for number, (first, length) in enumerate(prompt.images) if first + length > self.reused]
        self._bytes_per_token = bytes_per_token
        self._known: dict[int, Kept] = {}
        self.look()

    def look(self) -> None:
        """See which of the images that it needs are known by now; what it knows already it keeps."""
        if self._images is not None:
            found = {number: self._known.get(number) or self._images.get(self._digests[number]) for number in self._needed}
            self._known = {number: kept for number, kept in found.items() if kept is not None}
        self.to_make = tuple(number for number in self._needed if number not in self._known)

    def would_find(self, other: Place) -> bool:
        """Whether the other is to make visual tokens of an image that this one is to make too, and could find."""
        if self._images is None:
            return False
        mine, others = ({place._digests[number] for number in place.to_make} for place in (self, other))
        return not mine.isdisjoint(others)

    @property
    def counts(self) -> dict[str, int]:
        return {
            "cache: prefix tokens found": self.reused,
            "cache: prefix bytes found": self.reused * self._bytes_per_token,
            "cache: images found": len(self._known),
            "cache: image bytes found": sum(kept.n_bytes for kept in self._known.values()),
        }

    @property
    def hit(self) -> bool:
        """Whether anything of an earlier request is used."""
        return self.reused > 0 or len(self._known) > 0

    @property
    def n_bytes(self) -> int:
        """What holds the request's keys and values now: tensors that grow, the blocks it has taken, or a whole session's room."""
        return self.sequence.n_bytes

    def extend(self, n: int) -> None:
        """The next forward brings n more tokens of this request alone."""
        self.kv.extend([n])

    def visual_tokens(self, made: VisionTokens | None, among: range | None = None) -> VisionTokens | None:
        """The visual tokens that the rest of the prompt needs, from those of `to_make` and those that are kept.

        among: the numbers of the images that are asked for; by default all are. made: of those of `to_make` among them.
        """
        needed, making = (
            [number for number in numbers if among is None or number in among] for numbers in (self._needed, self.to_make)
        )
        if not needed:
            return None
        if self._images is None and self.reused == 0:
            return made
        lengths = [self._prompt.images[number][1] for number in making]
        pieces = dict(zip(making, split(made, lengths), strict=True)) if made is not None else {}
        if self._images is not None:
            for number, vision in pieces.items():
                self._images.put(self._digests[number], vision)
        pieces |= {number: kept.vision for number, kept in self._known.items()}
        first, length = self._prompt.images[needed[0]]
        inside = max(self.reused - first, 0)  # tokens of the first image that are in the KV cache already
        if inside > 0:
            pieces[needed[0]] = split(pieces[needed[0]], (inside, length - inside))[1]
        return join([pieces[number] for number in needed])

    def keep(self, generated: Sequence[int]) -> None:
        """Let later requests find this one's prompt and the generated tokens that went through the decoder."""
        if isinstance(self.sequence, PagedSequence):
            self.sequence.keep(generated)

    def close(self) -> None:
        """Give the room back, whoever still holds this object."""
        if isinstance(self.sequence, PagedSequence | ConcatSequence):
            self.sequence.close()


class PagedSequence(SlottedSequence):
    """One request's blocks of the paged cache: those of its n_prompt tokens are promised to it, and more it takes as it grows."""

    def __init__(self, paged: Paged, tokens: list[Token], n_prompt: int, longest: int, family: str, *, reuse: bool) -> None:
        self._pool, self._tokens, self._family, self._reuse = paged.pool, tokens, family, reuse
        self._table = paged.pool.admit(tokens, longest, first=n_prompt, family=family, reuse=reuse)
        super().__init__(paged.store, self._table.blocks, block_size=BLOCK_SIZE, longest=longest)
        self.length = self._table.reused

    def grow(self, length: int) -> None:
        """The first new block begins with what was found of one, if that was only a part."""
        assert length <= self.longest, "more tokens than were asked for"
        new = self._pool.extend(self._table, length)
        self.add_blocks(new)
        if self._table.source is not None:
            source, n = self._table.source
            self.store.copy_slots(source * BLOCK_SIZE, new[0] * BLOCK_SIZE, n)
            self._pool.copied(self._table)

    @property
    def n_missing(self) -> int:
        """Blocks that its next token takes beyond those that it was promised."""
        return self._pool.n_missing(self._table, self.length + 1)

    def keep(self, generated: Sequence[int]) -> None:
        """Let later requests find what of the prompt and of the generated tokens went through the decoder."""
        if self._reuse:
            self._pool.keep(self._table, [*self._tokens, *generated][: self.length], family=self._family)

    def close(self) -> None:
        self._pool.free(self._table)


def together(sequences: Sequence[ConcatSequence | SlottedSequence]) -> ConcatKv | SlottedKv:
    """One cache for forwards that bring tokens of each of these sequences; all are kept in one way, in slots of one store."""
    concat = [sequence for sequence in sequences if isinstance(sequence, ConcatSequence)]
    return ConcatKv(concat) if concat else SlottedKv([s for s in sequences if isinstance(s, SlottedSequence)])


class BoundCache:
    """The slot's toggles over a lab's memory.

    family: what decides how keys and values are rounded; images_by: what decides what becomes of an image.
    """

    def __init__(self, slot: Cache, memory: Memory, *, family: str, images_by: str) -> None:
        self._kv, self._memory, self._family, self._images_by = slot.kv, memory, family, images_by
        self._image_reuse, self._prefix_reuse = ({"off": False, "on": True}[x] for x in (slot.image_reuse, slot.prefix_reuse))

    @property
    def store(self) -> KvStore | None:
        """What every request's keys and values are in; None where each request has tensors of its own."""
        if self._kv == "concat":
            return None
        return self._memory.static if self._kv == "static" else self._memory.paged.store

    def has_room(self, n_tokens: int, *, beside: int) -> bool:
        """Whether a prompt of so many tokens has room now, even if nothing of it is found.

        A block is left then for its answer, and for that of each of the requests `beside` which it would be under way: else one of
        them had to give way at once.
        """
        if self._kv != "paged":
            return True
        return self._memory.paged.pool.n_available >= -(-n_tokens // BLOCK_SIZE) + beside + 1

    def has_room_for_step(self, places: Sequence[Place]) -> bool:
        """Whether a decode step of all of these finds the blocks that it takes."""
        if self._kv != "paged":
            return True
        missing = sum(place.sequence.n_missing for place in places if isinstance(place.sequence, PagedSequence))
        return missing <= self._memory.paged.pool.n_available

    def admit(self, prompt: Prompt, max_new_tokens: int, contents: Contents) -> Place:
        """A place for a prompt that is on the host still; raises `RequestError` where there is no room for it.

        There is room for the answer as long as the request is alone, or `has_room_for_step` says so. contents: of the request's
        images; asked for where something can be reused.
        """
        memory, digests = self._memory, []
        if self._image_reuse or self._prefix_reuse:
            digests = [image_digest(self._images_by, size, content) for size, content in contents()]
        images = memory.images if self._image_reuse else None
        total, shape = prompt.n_tokens + max_new_tokens, memory.shape
        sequence: ConcatSequence | SlottedSequence
        if self._kv == "concat":
            sequence = ConcatSequence(shape.n_layers)
        elif self._kv == "static":
            blocks = range(-(-total // BLOCK_SIZE))
            sequence = SlottedSequence(memory.static, blocks, block_size=BLOCK_SIZE, longest=memory.session_len)
        else:
            assert self._kv == "paged"
            tokens = _tokens(prompt, digests) if self._prefix_reuse else []
            sequence = PagedSequence(memory.paged, tokens, prompt.n_tokens, total, self._family, reuse=self._prefix_reuse)
        return Place(sequence, prompt, images=images, digests=digests, bytes_per_token=shape.bytes_per_token)


def _tokens(prompt: Prompt, digests: Sequence[bytes]) -> list[Token]:
    """What each token of the prompt is, so that equal tokens in equal places have equal keys and values."""
    tokens: list[Token] = prompt.input_ids.tolist()
    for (first, length), digest in zip(prompt.images, digests, strict=True):
        tokens[first : first + length] = [(digest, row) for row in range(length)]
    return tokens
