"""What a lab keeps for its caches within a budget: keys and values of a session, blocks of them to share, and visual tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastvl_lab.cache.blocks import BlockPool
from fastvl_lab.cache.images import ImageStore
from fastvl_lab.cache.slotted import KvShape, KvStore
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.memory import available_bytes, gigabytes
from fastvl_lab.errors import DeviceError

BLOCK_SIZE = 16

# Of the budget, an eighth is for visual tokens; the rest for keys and values.
_IMAGE_SHARE = 8

DEFAULT_SESSION_LEN = 32_768
_LEAST_SESSION_LEN = 1_024


@dataclass(frozen=True, kw_only=True, eq=False)
class Paged:
    """The blocks of the paged cache, and who owns them."""

    store: KvStore
    pool: BlockPool


class Memory:
    """The caches of one checkpoint, shared by all recipes that run on it; each part is allocated when it is first used.

    session_len: tokens of prompt and answer together. budget: bytes; `static` may take one session of it, visual tokens an eighth,
    and paged blocks the rest, which is at least one more session. By default two sessions and their eighth. Raises `DeviceError`
    for a budget that these do not fit into.
    """

    def __init__(self, checkpoint: Checkpoint, budget: int | None = None) -> None:
        self.shape, self.session_len = KvShape.of(checkpoint), checkpoint.session_len
        block_bytes = BLOCK_SIZE * self.shape.bytes_per_token
        least = least_budget(self.shape, self.session_len)
        self.budget = least if budget is None else budget
        if self.budget < least:
            raise DeviceError(
                f"memory_budget is {budget} bytes ({gigabytes(self.budget)}); a session_len of {self.session_len} tokens needs at "
                f"least {least} ({gigabytes(least)}), for two sessions of keys and values and an eighth for visual tokens: set a "
                f"larger memory_budget or a smaller session_len"
            )
        self._session_blocks = session_blocks = -(-self.session_len // BLOCK_SIZE)
        spare = 2 * self.shape.bytes_per_token  # a slot that is no sequence's, in either store
        self._pool_blocks = (self.budget - self.budget // _IMAGE_SHARE - spare) // block_bytes - session_blocks
        self.images = ImageStore(self.budget // _IMAGE_SHARE)
        self._static: KvStore | None = None
        self._paged: Paged | None = None

    @property
    def static(self) -> KvStore:
        """Room for one session, in one piece."""
        if self._static is None:
            self._static = self.shape.allocate(self._session_blocks * BLOCK_SIZE, in_place=True)
        return self._static

    @property
    def paged(self) -> Paged:
        """Blocks for all that is left."""
        if self._paged is None:
            store = self.shape.allocate(self._pool_blocks * BLOCK_SIZE)
            self._paged = Paged(store=store, pool=BlockPool(self._pool_blocks, BLOCK_SIZE))
        return self._paged

    @property
    def blocks(self) -> tuple[int, int]:
        """Of the paged cache: those in use, and all; from any thread."""
        return 0 if self._paged is None else self._paged.pool.n_used, self._pool_blocks

    def forget(self) -> None:
        """Forget what earlier requests left behind; the room for it stays allocated. No request may be under way."""
        self.images = ImageStore(self.images.max_bytes)
        if self._paged is not None:
            assert self._paged.pool.n_used == 0, "a request is under way"
            self._paged = replace(self._paged, pool=BlockPool(self._pool_blocks, BLOCK_SIZE))

    def held(self) -> dict[str, int]:
        """Bytes that are allocated now, by what for."""
        stores = {"keys and values, static": self._static, "keys and values, paged": self._paged.store if self._paged else None}
        held = {name: 0 if store is None else store.nbytes for name, store in stores.items()}
        return held | {"visual tokens of earlier images": self.images.n_bytes}

    @property
    def n_bytes(self) -> int:
        """What is allocated now."""
        return sum(self.held().values())


def least_budget(shape: KvShape, session_len: int) -> int:
    """Bytes of two sessions and of the visual tokens' share beside them."""
    kv_bytes = 2 * (-(-session_len // BLOCK_SIZE) * BLOCK_SIZE + 1) * shape.bytes_per_token
    return -(-kv_bytes * _IMAGE_SHARE // (_IMAGE_SHARE - 1))


def default_session_len(checkpoint: Checkpoint, *, reserved: int = 0) -> int:
    """What the model can attend to, up to 32,768 tokens; halved until the caches take at most half of the free memory.

    reserved: bytes of it that others will take. The other half is for what a request computes with.
    """
    session_len, free = min(checkpoint.max_length, DEFAULT_SESSION_LEN), available_bytes(checkpoint.device)
    shape = KvShape.of(checkpoint)
    while free is not None and session_len > _LEAST_SESSION_LEN and least_budget(shape, session_len) > (free - reserved) // 2:
        session_len //= 2
    return session_len
