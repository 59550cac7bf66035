"""Which blocks of the paged KV cache hold what: content-addressed, counted, evicted by age. It imports no torch.

A block holds the keys and values of block_size tokens. Its key says how they came about:

    key = H(parent's key, token ids, nothing if the block ends at or before activation_start,
                                     else (route digest, max(0, activation_start - first token)))
    the key before the first block = H(domain, salt)

so that tokens before activation are shared by the base model, every adapter and every router, and active ones only by
requests of the same route and start. Full blocks are found by key and shared. The block that activation_start cuts, and
the last, partial one of a conversation, are found by their parent's key, and what agrees at their start is copied: of
their base tokens for everyone, of all of them for the same route and start.

Blocks that nobody uses stay until room is needed: least recently used first, a conversation's end before its start.

With its tokens a block keeps a note on each, which whoever finds it is told: the route that the token took.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

from molora.serving.children import Children
from molora.serving.notes import Notes

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

    def suffix(self, first: int, block_size: int) -> bytes:
        """What the key of the block that begins at token `first` holds beside its ids: nothing if it is all base."""
        if first + block_size <= self.activation_start:
            return b""
        return self.route_digest + struct.pack("<q", max(0, self.activation_start - first))


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
        num_reencoded: tokens that were found as active ones only, and are needed as base.
        num_asked: tokens that were looked for.
        num_recomputed: of those, base tokens that were computed while a block that held them could be found.
        notes: on each token that was found; the sequence that the table is for goes on with them.
        copies: to be done before the first step; `BlockManager.copied` lets go of their sources.
    """

    source: Source
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_asked: int = 0
    num_reencoded: int = 0
    num_recomputed: int = 0
    notes: Notes[object] = field(default_factory=Notes)
    copies: list[Copy] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full blocks, the key before the first one first
    base_keys: list[bytes] = field(default_factory=list)  # the keys that they would have as base, likewise
    coming: list[bytes] = field(default_factory=list)  # of the blocks that it was announced to compute


@dataclass(slots=True)
class _Block:
    num_users: int = 0
    key: bytes | None = None  # while it is found by it
    base_key: bytes | None = None  # of an active block, while it is found by it
    parent: bytes | None = None  # while its base tokens are found by it
    acting_parent: bytes | None = None  # with the source's suffix, while all tokens of an active block are found by it
    base_parent: bytes | None = None  # the parent's base key, likewise
    token_ids: list[int] = field(default_factory=list)
    base_ids: list[int] = field(default_factory=list)  # those before activation; the same list where all are
    notes: list[object] = field(default_factory=list)
    begun: int = 0  # the step that computed its first token
    found_since: int = 0  # the step that registered its key


class BlockManager:
    """Hands out blocks to sequences and finds those that hold what a sequence begins with.

    Attributes:
        num_evicted: blocks whose contents were given up for room.
        step: counts the steps; whoever plans one moves it on.
    """

    def __init__(self, num_blocks: int, block_size: int, domain: bytes = b"") -> None:
        """domain: whatever else keys depend on: format version, base digest, dtype, attention configuration, KV policy.

        Raises:
            ValueError: a size is not positive.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evicted = 0
        self.step = 0
        self._domain = domain
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # hold contents and have no user; oldest first
        self._by_key: dict[bytes, int] = {}
        # Two routes may agree in many tokens and share none, so each looks among base tokens and among its own alone.
        self._by_parent: defaultdict[bytes, Children] = defaultdict(Children)
        self._by_acting_parent: defaultdict[bytes, Children] = defaultdict(Children)
        # Active blocks by the keys that they would have if they were base.
        self._by_base_key: Counter[bytes] = Counter()
        self._by_base_parent: defaultdict[bytes, Children] = defaultdict(Children)
        self._coming: Counter[bytes] = Counter()
        self._key = lru_cache(num_blocks)(_key)  # a history's are asked for again with each turn that follows it

    @property
    def num_free(self) -> int:
        """Blocks that a sequence can get, by eviction if need be."""
        return len(self._empty) + len(self._idle)

    def keys(self, token_ids: Sequence[int], source: Source) -> list[bytes]:
        """The keys of a sequence's full blocks, after the one that stands before the first. Any thread may ask."""
        size = self.block_size
        keys = [_hash(b"molora-kv-2", struct.pack("<q", size), self._domain, source.salt)]
        data = _packed(token_ids)
        num_blocks = len(token_ids) // size
        num_base = min(num_blocks, source.activation_start // size)
        for index in range(num_blocks):
            suffix = b"" if index < num_base else source.suffix(index * size, size)
            keys.append(self._key(keys[-1], data[4 * size * index : 4 * size * (index + 1)], suffix))
        return keys

    def open(self, token_ids: Sequence[int], source: Source, keys: Sequence[bytes] | None = None) -> BlockTable:
        """A table that begins with what is found of these tokens: shared blocks, and then at most one copy.

        A last block is copied only where there is a block to copy into; without one the table simply begins with less.

        Args:
            keys: what `keys` gave for them, if the caller kept it.
        """
        keys = self.keys(token_ids, source) if keys is None else keys
        table = BlockTable(source, num_asked=len(token_ids))
        for key in keys[1:]:
            number = self._by_key.get(key)
            if number is None:
                break
            self._take(number)
            table.blocks.append(number)
        table.keys += keys[: len(table.blocks) + 1]
        table.notes = self._notes(table)
        table.num_computed = len(table.blocks) * self.block_size
        table.base_keys = self._base_keys(table, token_ids)
        self._copy_what_agrees(table, token_ids)
        table.num_cached = table.num_computed
        table.num_reencoded = self._count_reencoded(table, token_ids)
        return table

    def first_missing(self, keys: Sequence[bytes]) -> bytes | None:
        """The key of the first block that would not be found."""
        return next((key for key in keys[1:] if key not in self._by_key), None)

    def is_coming(self, key: bytes) -> bool:
        """Whether a sequence that runs was announced to compute the block of this key."""
        return key in self._coming

    def announce(self, table: BlockTable, keys: Sequence[bytes]) -> None:
        """The sequence of these keys will compute the blocks that were not found."""
        table.coming = list(keys[len(table.keys) :])
        self._coming.update(table.coming)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for the first num_tokens of a sequence; False, and nothing changed, if there are too few blocks."""
        num_missing = -(-num_tokens // self.block_size) - len(table.blocks)
        if num_missing > self.num_free:
            return False
        for _ in range(num_missing):
            table.blocks.append(self._new())
        return True

    def give_up_copies(self, table: BlockTable) -> None:
        """Of a table that was just opened: the tokens that would have been copied are computed."""
        for copy in table.copies:
            table.blocks.remove(copy.target)
            self._drop(copy.target)
            table.num_computed -= copy.num_tokens
        table.notes = self._notes(table)
        table.num_cached = table.num_computed
        self.copied(table)

    def copied(self, table: BlockTable) -> None:
        """The table's copies are done: their sources may go."""
        for copy in table.copies:
            self._drop(copy.source)
        table.copies.clear()

    def commit(
        self,
        table: BlockTable,
        token_ids: Sequence[int],
        num_computed: int,
        notes: Notes[object] | Sequence[object] | None = None,
        *,
        step: int | None = None,
    ) -> None:
        """The keys and values of the first num_computed tokens are in the table's blocks: let others find them.

        Args:
            notes: one on each of those tokens; None is no note on any.
            step: the one that computed them; the last one that was planned if None.

        Raises:
            ValueError: fewer than before, more than there are tokens, or more than the blocks hold.
        """
        if not table.num_computed <= num_computed <= min(len(token_ids), len(table.blocks) * self.block_size):
            raise ValueError(
                f"num_computed must be from {table.num_computed} to the {len(token_ids)} tokens and "
                f"{len(table.blocks) * self.block_size} places that there are, got {num_computed}."
            )
        size, before = self.block_size, table.num_computed
        table.num_computed = num_computed
        for index in range(before // size, -(-num_computed // size)):
            first = index * size
            end = min(first + size, num_computed)
            number = table.blocks[index]
            block, fresh = self._blocks[number], slice(max(first, before), end)
            block.token_ids += token_ids[fresh]
            block.notes += [None] * (end - fresh.start) if notes is None else notes[fresh]
            if first >= before:
                block.begun = self.step if step is None else step
            is_active = end > table.source.activation_start
            self._link(table, number, first, is_active)
            if end - first == size:
                self._settle(number)
                self._complete(table, number, first, is_active)

    def close(self, table: BlockTable) -> None:
        """Nobody needs the sequence any more; what it computed can be found until its blocks are needed."""
        self.copied(table)
        for block in reversed(table.blocks):  # the end of a sequence is worth less than its start
            self._drop(block)
        for key in table.coming:
            self._arrived(key)
        table.blocks.clear()
        table.coming.clear()
        table.num_computed = 0

    def _link(self, table: BlockTable, number: int, first: int, is_active: bool) -> None:
        """Let a block's tokens be found, each by those who would compute it alike."""
        block, index = self._blocks[number], first // self.block_size
        num_base = max(0, table.source.activation_start - first)
        if num_base >= self.block_size:
            block.base_ids = block.token_ids
        else:
            block.base_ids += block.token_ids[len(block.base_ids) : num_base]
        if num_base and block.parent is None:
            block.parent = table.keys[index]
            self._by_parent[block.parent].add(number, block.base_ids)
        if is_active and block.acting_parent is None:
            block.acting_parent = table.keys[index] + table.source.suffix(first, self.block_size)
            self._by_acting_parent[block.acting_parent].add(number, block.token_ids)
            block.base_parent = table.base_keys[index]
            self._by_base_parent[block.base_parent].add(number, block.token_ids)

    def _complete(self, table: BlockTable, number: int, first: int, is_active: bool) -> None:
        """A block is full: register its key, and the one it would have as base."""
        block, size = self._blocks[number], self.block_size
        data = _packed(block.token_ids)
        key = self._key(table.keys[-1], data, table.source.suffix(first, size))
        table.keys.append(key)
        base_key = key
        if is_active:
            base_key = self._key(table.base_keys[-1], data, b"")
            block.base_key = base_key
            self._by_base_key[base_key] += 1
        table.base_keys.append(base_key)
        if table.coming and table.coming[0] == key:
            self._arrived(table.coming.pop(0))
        other = self._by_key.setdefault(key, number)
        holder = self._blocks[other]
        if holder is block:
            block.key, block.found_since = key, self.step
            return
        was_asked = first + size <= table.num_asked
        if was_asked and not is_active and holder.found_since < block.begun:
            table.num_recomputed += size
        if holder.num_users:
            self._unlink(number)  # one of a kind is enough to find
        else:  # nobody uses the other one
            block.key, block.found_since = key, holder.found_since
            self._idle.pop(other)
            self._forget(other)
            self._empty.append(other)
            self._by_key[key] = number

    def _notes(self, table: BlockTable) -> Notes[object]:
        """On the tokens of whole blocks that were found."""
        return Notes([self._blocks[number].notes for number in table.blocks])

    def _arrived(self, key: bytes) -> None:
        self._coming[key] -= 1
        if not self._coming[key]:
            del self._coming[key]

    def _base_keys(self, table: BlockTable, token_ids: Sequence[int]) -> list[bytes]:
        """The keys that the table's blocks would have if they were base."""
        size = self.block_size
        num_base = min(len(table.blocks), table.source.activation_start // size)
        keys = table.keys[: num_base + 1]
        for first in range(num_base * size, len(table.blocks) * size, size):
            keys.append(self._key(keys[-1], _packed(token_ids[first : first + size]), b""))
        return keys

    def _count_reencoded(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """How many of the next tokens are needed as base, and held as active ones only."""
        size, first = self.block_size, len(table.blocks) * self.block_size
        if table.copies:
            first -= size
        key = table.base_keys[-1]
        end = min(len(token_ids), table.source.activation_start)
        while first + size <= end:
            following = self._key(key, _packed(token_ids[first : first + size]), b"")
            if following not in self._by_base_key and following not in self._by_key:
                break
            key, first = following, first + size
        wanted = list(token_ids[first : min(first + size, end)])
        holders = [children[key] for children in (self._by_base_parent, self._by_parent) if key in children]
        agreed = max((each.nearest(wanted)[1] for each in holders), default=0)
        return max(0, first + agreed - table.num_computed)

    def _copy_what_agrees(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        first = len(table.blocks) * self.block_size
        wanted = list(token_ids[first : first + self.block_size])
        parent, source = table.keys[-1], table.source
        num_base = max(0, source.activation_start - first)
        found = []
        if parent in self._by_parent:
            found.append(self._by_parent[parent].nearest(wanted[:num_base]))
        acting_parent = parent + source.suffix(first, self.block_size)
        if acting_parent in self._by_acting_parent:
            found.append(self._by_acting_parent[acting_parent].nearest(wanted))
        best, most = max(found, key=lambda each: each[1], default=(-1, 0))
        if not most:
            return
        self._take(best)
        if not self.num_free:
            self._drop(best)
            return
        target = self._new()
        table.copies.append(Copy(best, target, most))
        table.blocks.append(target)
        copied = self._blocks[target]
        copied.token_ids, copied.notes = wanted[:most], self._blocks[best].notes[:most]
        table.notes += copied.notes
        table.num_computed += most

    def _take(self, number: int) -> None:
        self._blocks[number].num_users += 1
        self._idle.pop(number, None)

    def _drop(self, number: int) -> None:
        block = self._blocks[number]
        block.num_users -= 1
        if block.num_users == 0:
            if block.parent is not None or block.acting_parent is not None:
                self._settle(number)
                self._idle[number] = None
            else:
                self._blocks[number] = _Block()
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

    def _settle(self, number: int) -> None:
        """Nobody adds to the block any more."""
        block = self._blocks[number]
        if block.parent is not None:
            self._by_parent[block.parent].settle(number)
        if block.acting_parent is not None and block.base_parent is not None:
            self._by_acting_parent[block.acting_parent].settle(number)
            self._by_base_parent[block.base_parent].settle(number)

    def _unlink(self, number: int) -> None:
        block = self._blocks[number]
        if block.parent is not None:
            _remove_child(self._by_parent, block.parent, number, block.base_ids)
        if block.acting_parent is not None and block.base_parent is not None:
            _remove_child(self._by_acting_parent, block.acting_parent, number, block.token_ids)
            _remove_child(self._by_base_parent, block.base_parent, number, block.token_ids)
        block.parent = block.acting_parent = block.base_parent = None
        if block.base_key is not None:
            self._by_base_key[block.base_key] -= 1
            if not self._by_base_key[block.base_key]:
                del self._by_base_key[block.base_key]
            block.base_key = None


def _remove_child(children: dict[bytes, Children], parent: bytes, number: int, token_ids: list[int]) -> None:
    children[parent].remove(number, token_ids)
    if not children[parent]:
        del children[parent]


def _packed(token_ids: Sequence[int]) -> bytes:
    if not isinstance(token_ids, array) or token_ids.typecode != "i":
        token_ids = array("i", token_ids)
    return token_ids.tobytes()


def _key(parent: bytes, token_ids: bytes, suffix: bytes) -> bytes:
    """Parts of known lengths, the last one empty or not, need no separators."""
    return blake2b(parent + token_ids + suffix, digest_size=16).digest()


def _hash(*parts: bytes) -> bytes:
    """Of the parts and where each ends."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.digest()
