"""Which blocks of the paged KV cache hold what: content-addressed, counted, evicted by age. It imports no torch.

A block holds the keys and values of block_size tokens. Its key says how they came about:

    key = H(parent's key, token ids, nothing if the block ends at or before activation_start,
                                     else (route digest, max(0, activation_start - first token)))
    the key before the first block = H(domain, salt)

so that tokens before activation are shared by the base model, every adapter and every router, and active ones only by
requests of the same route and start. Full blocks are found by key and shared. The block that activation_start cuts, and
the last, partial one of a conversation, are found by their parent's key, and what agrees at their start is copied.

Blocks that nobody uses stay until room is needed: least recently used first, a conversation's end before its start.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

NEVER = 2**62  # the activation_start of a request that the base model answers


@dataclass(frozen=True)
class Source:
    """What computes a sequence's tokens, beside their ids.

    Attributes:
        activation_start: the first active token; `NEVER` for the base model.
        route_digest: of the adapters' or the router's contents, never of a name; empty for the base model.
        salt: nothing is shared between sequences of different salts.
    """

    activation_start: int = NEVER
    route_digest: bytes = b""
    salt: bytes = b""

    def __post_init__(self) -> None:
        if self.activation_start < 0:
            raise ValueError(f"activation_start must be at least 0, got {self.activation_start}.")
        if self.activation_start < NEVER and not self.route_digest:
            raise ValueError("a sequence with active tokens needs the digest of its route.")


@dataclass(frozen=True)
class Copy:
    """The first num_tokens of a block, to be copied into another before the step that reads them."""

    source: int
    target: int
    num_tokens: int


@dataclass
class BlockTable:
    """The blocks of one sequence, in order.

    Attributes:
        blocks: their numbers.
        num_computed: tokens whose keys and values are in them.
        num_cached: how many of those were found and not computed.
        copies: to be done before the first step; `BlockManager.copied` lets go of their sources.
    """

    source: Source
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    copies: list[Copy] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full blocks, the key before the first one first


@dataclass
class _Block:
    num_users: int = 0
    key: bytes | None = None  # while it is found by it
    parent: bytes | None = None  # while it is found by it
    token_ids: tuple[int, ...] = ()
    source: Source | None = None


class BlockManager:
    """Hands out blocks to sequences and finds those that hold what a sequence begins with.

    Attributes:
        num_recomputed: base tokens that were computed while a block that held them could be found.
        num_evicted: blocks whose contents were given up for room.
    """

    def __init__(self, num_blocks: int, block_size: int, domain: bytes = b"") -> None:
        """domain: whatever else keys depend on: format version, base digest, dtype, attention configuration, KV policy.

        Raises:
            ValueError: a size is not positive.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}.")
        self.block_size = block_size
        self.num_recomputed = 0
        self.num_evicted = 0
        self._domain = _hash(b"molora-kv-1", struct.pack("<q", block_size), domain)
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # hold contents and have no user; oldest first
        self._by_key: dict[bytes, int] = {}
        self._by_parent: defaultdict[bytes, dict[int, None]] = defaultdict(dict)  # oldest first

    @property
    def num_free(self) -> int:
        """Blocks that a sequence can get, by eviction if need be."""
        return len(self._empty) + len(self._idle)

    def open(self, token_ids: Sequence[int], source: Source) -> BlockTable:
        """A table that begins with what is found of these tokens: shared blocks, and then at most one copy.

        A last block is copied only where there is a block to copy into; without one the table simply begins with less.
        """
        table = BlockTable(source, keys=[_hash(self._domain, source.salt)])
        while (first := len(table.blocks) * self.block_size) + self.block_size <= len(token_ids):
            ids = tuple(token_ids[first : first + self.block_size])
            key = self._key(table.keys[-1], ids, first, source)
            block = self._by_key.get(key)
            if block is None:
                break
            self._take(block)
            table.blocks.append(block)
            table.keys.append(key)
        table.num_computed = len(table.blocks) * self.block_size
        self._copy_what_agrees(table, token_ids)
        table.num_cached = table.num_computed
        return table

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for the first num_tokens of a sequence; False, and nothing changed, if there are too few blocks."""
        num_missing = -(-num_tokens // self.block_size) - len(table.blocks)
        if num_missing > self.num_free:
            return False
        for _ in range(num_missing):
            table.blocks.append(self._new())
        return True

    def copied(self, table: BlockTable) -> None:
        """The table's copies are done: their sources may go."""
        for copy in table.copies:
            self._drop(copy.source)
        table.copies.clear()

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """The keys and values of the first num_computed tokens are in the table's blocks: let others find them.

        Raises:
            ValueError: fewer than before, more than there are tokens, or more than the blocks hold.
        """
        if not table.num_computed <= num_computed <= min(len(token_ids), len(table.blocks) * self.block_size):
            raise ValueError(
                f"num_computed must be from {table.num_computed} to the {len(token_ids)} tokens and "
                f"{len(table.blocks) * self.block_size} places that there are, got {num_computed}."
            )
        first_changed = table.num_computed // self.block_size
        table.num_computed = num_computed
        for index in range(first_changed, -(-num_computed // self.block_size)):
            first = index * self.block_size
            ids = tuple(token_ids[first : min(first + self.block_size, num_computed)])
            block = self._blocks[table.blocks[index]]
            parent = table.keys[index]
            block.token_ids, block.source = ids, table.source
            if block.parent is None:
                block.parent = parent
                self._by_parent[parent][table.blocks[index]] = None
            if len(ids) == self.block_size:
                key = self._key(parent, ids, first, table.source)
                table.keys.append(key)
                self._register(table.blocks[index], key, first + self.block_size <= table.source.activation_start)

    def close(self, table: BlockTable) -> None:
        """Nobody needs the sequence any more; what it computed can be found until its blocks are needed."""
        self.copied(table)
        for block in reversed(table.blocks):  # the end of a sequence is worth less than its start
            self._drop(block)
        table.blocks.clear()
        table.keys.clear()
        table.num_computed = 0

    def _key(self, parent: bytes, ids: tuple[int, ...], first: int, source: Source) -> bytes:
        parts = [parent, struct.pack(f"<{len(ids)}q", *ids)]
        if first + len(ids) > source.activation_start:
            parts += [source.route_digest, struct.pack("<q", max(0, source.activation_start - first))]
        return _hash(*parts)

    def _register(self, number: int, key: bytes, is_base: bool) -> None:
        holder = self._by_key.setdefault(key, number)
        if holder == number:
            self._blocks[number].key = key
            return
        self._unlink(number)  # one of a kind is enough to find
        if is_base:
            self.num_recomputed += self.block_size

    def _copy_what_agrees(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        first = len(table.blocks) * self.block_size
        wanted = tuple(token_ids[first : first + self.block_size])
        best, most = -1, 0
        for number in self._by_parent.get(table.keys[-1], ()):
            agreed = self._count_agreed(self._blocks[number], wanted, first, table.source)
            if agreed > most:
                best, most = number, agreed
        if not most:
            return
        self._take(best)
        if not self.num_free:
            self._drop(best)
            return
        target = self._new()
        table.copies.append(Copy(best, target, most))
        table.blocks.append(target)
        table.num_computed += most

    @staticmethod
    def _count_agreed(block: _Block, wanted: tuple[int, ...], first: int, source: Source) -> int:
        """How many tokens at the start of a block are the wanted ones and were computed alike."""
        assert block.source is not None
        agreed = 0
        while agreed < min(len(wanted), len(block.token_ids)) and wanted[agreed] == block.token_ids[agreed]:
            agreed += 1
        if block.source == source:
            return agreed
        starts = (block.source.activation_start, source.activation_start)
        if starts[0] == starts[1] and block.source.route_digest == source.route_digest:
            return agreed
        return min(agreed, max(0, min(starts) - first))

    def _take(self, number: int) -> None:
        self._blocks[number].num_users += 1
        self._idle.pop(number, None)

    def _drop(self, number: int) -> None:
        block = self._blocks[number]
        block.num_users -= 1
        if block.num_users == 0:
            if block.parent is not None:
                self._idle[number] = None
            else:
                self._empty.append(number)

    def _new(self) -> int:
        if not self._empty:
            number, _ = self._idle.popitem(last=False)
            self._forget(number)
            self.num_evicted += 1
            self._empty.append(number)
        number = self._empty.pop()
        self._take(number)
        return number

    def _forget(self, number: int) -> None:
        block = self._blocks[number]
        if block.key is not None:
            del self._by_key[block.key]
        self._unlink(number)
        self._blocks[number] = _Block()

    def _unlink(self, number: int) -> None:
        block = self._blocks[number]
        if block.parent is not None:
            children = self._by_parent[block.parent]
            del children[number]
            if not children:
                del self._by_parent[block.parent]
            block.parent = None


def _hash(*parts: bytes) -> bytes:
    """Of the parts and where each ends."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.digest()
