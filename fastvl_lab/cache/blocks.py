"""Who owns which block of the paged cache: a free list, reference counts, and a tree of what finished requests left behind.

Bookkeeping on the host alone; no tensor is touched here. A block is free, or used by sequences (it has references), or kept: nobody
uses it, but it is found again by its content until the room is needed. Content is compared token by token, never by a digest of
many: a block is found only below the blocks that came before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from fastvl_lab.errors import RequestError

# What a token is: the id of a text token; for a visual token, its image's digest and its row in the image.
Token = Hashable


@dataclass(kw_only=True, eq=False)
class Table:
    """The blocks of one sequence, in order.

    reused: tokens that were found. promised: blocks that it may still take. source: a block whose first tokens are to be copied
    into the block after the shared ones, and how many. home: neighbours that it takes first where they are free, so that it lies
    in one piece beside others that grow.
    """

    blocks: list[int] = field(default_factory=list)
    reused: int = 0
    promised: int = 0
    source: tuple[int, int] | None = None
    home: range = range(0)


@dataclass(kw_only=True, eq=False)
class _Node:
    """A full block whose content can be found: its tokens, the node before it, and the nodes after it by their tokens."""

    block: int
    tokens: tuple[Token, ...]
    parent: _Node | None
    children: dict[tuple[Token, ...], _Node] = field(default_factory=dict)


class BlockPool:
    """`n_blocks` blocks of `block_size` tokens.

    A sequence is admitted with a promise of the blocks that its first tokens need; what can be had is never promised twice. Further
    blocks it takes as it grows, while there are any that nobody was promised (`n_missing`, `n_available`). One that is alone has
    them always. Blocks that are kept go when there is no free one, the one unused for longest first.
    """

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks, self.block_size = n_blocks, block_size
        self._free = bytearray([1]) * n_blocks  # a byte a block: whether it is free
        self._homes: list[range] = []
        self._references = [0] * n_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._node_of: dict[int, _Node] = {}
        self._roots: dict[Hashable, _Node] = {}
        self._promised = 0

    @property
    def n_available(self) -> int:
        """Blocks that can still be promised: free or kept, and promised to nobody."""
        return self._free.count(1) + len(self._kept) - self._promised

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    @property
    def n_used(self) -> int:
        """Blocks of sequences; one look, so that any thread may ask while another takes and gives back."""
        return self.n_blocks - self._references.count(0)

    def admit(
        self, tokens: Sequence[Token], total: int, *, first: int | None = None, family: Hashable = None, reuse: bool = True
    ) -> Table:
        """Room for a sequence of up to `total` tokens that begins with these; what is there of them is shared.

        first: how many of its tokens are promised room now; by default all. family: sequences of different families never share
        (other recipes round differently). The last of `tokens` is never taken as found: somebody must compute its logits. Raises
        `RequestError` if that room cannot be had, or all of it never.
        """
        size = self.block_size
        nodes, partly, common = self._find(tokens, family) if reuse else ([], None, 0)
        whole = self._n_blocks_of(total)
        needed, promised = whole - len(nodes), self._n_blocks_of(total if first is None else first) - len(nodes)
        available = self.n_available - sum(node.block in self._kept for node in nodes)
        if promised > available or whole > self.n_blocks:
            raise RequestError(
                f"the request needs {whole} cache blocks of {size} tokens for its {total} tokens, and "
                f"{available + len(nodes)} of {self.n_blocks} can be had; set a smaller max_pixels or max_new_tokens, or give the "
                f"lab a larger memory_budget"
            )
        table = Table(promised=promised)
        self._promised += promised
        if needed and (start := self._find_free(needed)) >= 0:
            table.home = range(start, start + needed)
            self._homes.append(table.home)
        for node in nodes:
            self._refer(node.block)
            table.blocks.append(node.block)
        table.reused = len(nodes) * size
        if partly is not None and promised < available + (partly.block not in self._kept):
            self._refer(partly.block)  # until it is copied
            table.source = (partly.block, common)
            table.reused += common
        return table

    def n_missing(self, table: Table, length: int) -> int:
        """Blocks beyond those that it has and was promised, for `length` tokens."""
        return max(self._n_blocks_of(length) - len(table.blocks) - table.promised, 0)

    def extend(self, table: Table, length: int) -> list[int]:
        """Blocks so that the table holds `length` tokens; returns the new ones."""
        assert self.n_missing(table, length) <= self.n_available, "a sequence took blocks that others were promised"
        new = []
        while len(table.blocks) * self.block_size < length:
            if table.promised > 0:
                table.promised -= 1
                self._promised -= 1
            new.append(self._take(table.home))
            table.blocks.append(new[-1])
        return new

    def copied(self, table: Table) -> None:
        """The source's tokens have been copied; it is let go."""
        if table.source is not None:
            source, table.source = table.source[0], None
            self._release(source)

    def keep(self, table: Table, tokens: Sequence[Token], *, family: Hashable = None) -> None:
        """Let others find the table's full blocks, whose content these tokens are."""
        size = self.block_size
        node = self._roots.setdefault(family, _Node(block=-1, tokens=(), parent=None))
        for number in range(min(len(tokens) // size, len(table.blocks))):
            here, block = tuple(tokens[number * size : (number + 1) * size]), table.blocks[number]
            child = node.children.get(here)
            if child is None:
                child = _Node(block=block, tokens=here, parent=node)
                node.children[here] = self._node_of[block] = child
            elif child.block != block:  # another sequence was first; its block stands for both
                self._refer(child.block)
                self._release(block)
                table.blocks[number] = child.block
            node = child
        self._drop_empty_root(family)

    def free(self, table: Table) -> None:
        """Give everything back: promises, the source, and blocks, of which those that can be found are kept."""
        self._promised -= table.promised
        table.promised = 0
        if table.home in self._homes:
            self._homes.remove(table.home)
        table.home = range(0)  # which may be another's by the time that this one is freed again
        self.copied(table)
        for block in reversed(table.blocks):  # the end of a sequence is of less use than its beginning, and goes first
            self._release(block)
        table.blocks.clear()

    def _n_blocks_of(self, length: int) -> int:
        return -(-length // self.block_size)

    def _find(self, tokens: Sequence[Token], family: Hashable) -> tuple[list[_Node], _Node | None, int]:
        """The nodes of the whole blocks that are there, a node of which only the first tokens are wanted, and how many."""
        node, nodes, at, size = self._roots.get(family), [], 0, self.block_size
        while node is not None and at + size < len(tokens):
            child = node.children.get(tuple(tokens[at : at + size]))
            if child is None:
                break
            nodes.append(child)
            node, at = child, at + size
        partly, common = None, 0
        if node is not None:
            wanted = tuple(tokens[at : min(at + size, len(tokens) - 1)])
            for child in node.children.values():
                same = _n_same(child.tokens, wanted)
                if same > common:
                    partly, common = child, same
        return nodes, partly, common

    def _refer(self, block: int) -> None:
        self._kept.pop(block, None)
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, "a block was given back twice"
        if self._references[block] == 0:
            if block in self._node_of:
                self._kept[block] = None
            else:
                self._free[block] = 1

    def _take(self, home: range) -> int:
        """A free block, the next of its home, else one of nobody's home, else any; else the one kept unused for longest."""
        block = self._free.find(1, home.start, home.stop)
        if block < 0:
            block = self._find_free(1)
        if block < 0:
            block = self._free.find(1)
        if block < 0:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        self._free[block] = 0
        self._references[block] = 1
        return block

    def _find_free(self, n: int) -> int:
        """The first of n free neighbours that are nobody's home; -1 where there are not so many."""
        run, start = bytes([1]) * n, 0
        while (start := self._free.find(run, start)) >= 0:
            taken = next((home for home in self._homes if home.start < start + n and start < home.stop), None)
            if taken is None:
                return start
            start = taken.stop
        return -1

    def _forget(self, block: int) -> None:
        """Take a block out of the tree; whoever used a node after it also used it, so there is none any more."""
        node = self._node_of.pop(block)
        assert not node.children
        assert node.parent is not None
        del node.parent.children[node.tokens]
        if node.parent.parent is None and not node.parent.children:
            self._roots = {family: root for family, root in self._roots.items() if root is not node.parent}

    def _drop_empty_root(self, family: Hashable) -> None:
        if not self._roots[family].children:
            del self._roots[family]


def _n_same(a: Sequence[Token], b: Sequence[Token]) -> int:
    """Length of the common beginning."""
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return number
    return min(len(a), len(b))
