"""Prompts that begin alike are computed once (prefix caching, as vLLM's automatic one): keys and values of
finished prompts are kept in memory, and on disk where that is asked for; those under way are shared.

Only a prompt's own tokens are shared, in whole chunks of the model: a reply's were computed one by one, and a
chunk's last bits depend on where it was cut. So an answer has the same bits with this cache and without
(tests/laws/test_batch.py, test_prefixes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outsize.engine.request import Request
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.kv.prefix import common
from outsize.prefix.disk import DiskBlocks, Shape
from outsize.prefix.keys import chain, root
from outsize.prefix.memory import MemoryBlocks

# Of an adapter's name: what blocks are bound to beside tokens, all that their bits depend on.
Ties = Callable[[str | None], dict[str, object]]


def by_name(adapter: str | None) -> dict[str, object]:
    """The ties of one process in which an adapter keeps its name."""
    return {"adapter": adapter}


class Prefixes:
    """Keeps keys and values of prompts in blocks of `chunk` tokens, the latest used longest."""

    def __init__(
        self,
        chunk: int,
        most: int = 1 << 40,
        disk: DiskBlocks | None = None,
        ties: Ties = by_name,
        backend: Backend = PLAIN,
    ) -> None:
        """`most`: tokens that are kept in memory."""
        self._chunk, self._most, self._ties = chunk, most, ties
        self._memory, self.disk, self._backend = MemoryBlocks(chunk), disk, backend
        self.hits = 0  # tokens that were not computed again

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are kept in memory."""
        return self._memory.tokens

    def forget(self) -> bool:
        """Let go of the block in memory that was not used for longest; False: there is none."""
        return self._memory.forget()

    def limit(self, tokens: int) -> None:
        """Keep no more in memory from now on."""
        self._most = min(self._most, tokens)
        while self.tokens > self._most and self.forget():
            pass

    def shrink(self, size: int) -> int:
        """Let go of blocks of so many bytes in all, if there are so many; the bytes."""
        before = self._memory.nbytes
        while before - self._memory.nbytes < size and self.forget():
            pass
        return before - self._memory.nbytes

    def clear(self) -> None:
        self._memory.clear()

    def flush(self) -> None:
        """Wait until everything is written."""
        if self.disk is not None:
            self.disk.flush()

    def close(self) -> None:
        """Write what is to be written."""
        self.clear()
        if self.disk is not None:
            self.disk.close()

    def keys(self, request: Request) -> list[bytes]:
        """The names of a prompt's whole chunks; none where tokens may skip layers: nothing is shared."""
        if request.is_lazy:
            return []
        if request.keys is None:
            start = root(self._ties(request.adapter))
            request.keys = chain(start, request.seq.tokens[: request.seq.num_prompt], self._chunk)
        return request.keys

    def is_coming(self, request: Request, running: Sequence[Request]) -> bool:
        """Will a request that runs soon have computed more of this prompt's beginning than there is now?"""
        more = [s for o in running if (s := self._shared(request, o)) > self._computed(o)]
        return bool(more) and max(more) > max(request.cached, self._there(request) * self._chunk)

    def make_room(self, request: Request, tokens: int) -> bool:
        """Let go of blocks until at most so many tokens are kept in memory; a request's own go last. True:
        those that are left are its own, and are to be taken, not copied."""
        own = frozenset(self.keys(request))
        while self.tokens > tokens and self._memory.forget(own):
            pass
        return self.tokens > tokens

    def use(self, request: Request, running: Sequence[Request], take: bool = False) -> None:
        """Begin a request's cache with the longest beginning of its prompt that there is. `take`: what is in
        memory is moved."""
        wanted = self._usable(request)
        best = max(running, key=lambda other: self._ready(request, other), default=None)
        shared = 0 if best is None else self._ready(request, best)
        there = self._there(request) * self._chunk
        if max(shared, there) <= request.cached:
            return
        request.kv.truncate(0)
        if best is not None and shared >= there:
            request.kv.copy_from(best.kv, shared)
            found = shared
        else:
            found = self._restore(request, wanted[: there // self._chunk], take)
        self._memory.touch(wanted)
        request.cached = request.known = request.exact = found
        self.hits += found

    def keep(self, request: Request, is_last: bool = True) -> None:
        """What a request that has ended computed of its prompt. `is_last`: nobody needs its cache any more,
        which is taken apart."""
        keys = self.keys(request)[: self._computed(request) // self._chunk]
        first = 0
        while first < len(keys) and keys[first] in self._memory:
            first += 1
        count = min(len(keys), self._most // self._chunk) - first if is_last else 0
        if self.disk is not None:
            self._write(self.disk, request, keys[: first if count > 0 else len(keys)])
        if count > 0:
            self._put(request, keys[first : first + count], first)
        self._memory.touch(keys)
        self.limit(self._most)
        request.exact = len(keys) * self._chunk

    def _put(self, request: Request, keys: Sequence[bytes], first: int) -> None:
        """Blocks from number `first` on, into memory, and to disk."""
        made = request.kv.blocks(first * self._chunk, self._chunk, len(keys), move=True)
        for number, (key, block) in enumerate(zip(keys, made, strict=True), first):
            self._memory.put(key, block)
            if self.disk is not None and number < self.disk.fitting(block.nbytes):
                self.disk.put(key, number, block, request.traffic)

    def _write(self, disk: DiskBlocks, request: Request, keys: Sequence[bytes]) -> None:
        """To disk, block by block, a prompt's first that are not there."""
        disk.touch(keys)
        for i, key in enumerate(keys[: disk.fitting(self._shape(request).nbytes)]):
            if key not in disk:
                block = self._memory.get(key)
                if block is None:
                    (block,) = request.kv.blocks(i * self._chunk, self._chunk, 1)
                disk.put(key, i, block, request.traffic)

    def _restore(self, request: Request, keys: Sequence[bytes], take: bool) -> int:
        """Append blocks to an empty cache, as far as they are there and sound; their tokens."""
        kv, count = request.kv, 0
        for key in keys:
            block = self._memory.take(key) if take else self._memory.get(key)
            if block is None:
                break
            kv.append_block(block)
            count += 1
        if self.disk is not None and count < len(keys):
            shape = self._shape(request)
            for block in self.disk.read(keys[count:], shape, self._backend, request.traffic):
                kv.append_block(block)
                count += 1
            self.disk.touch(keys)
        return count * self._chunk

    def _shape(self, request: Request) -> Shape:
        """Of a block."""
        like = request.kv.like
        layers, heads, _, dim = like.shape
        return Shape((layers, heads, self._chunk, dim), like.dtype)

    def _there(self, request: Request) -> int:
        """Blocks of a prompt's beginning that are in memory or on disk."""
        count = 0
        for key in self._usable(request):
            if key not in self._memory and (self.disk is None or key not in self.disk):
                break
            count += 1
        return count

    def _usable(self, request: Request) -> list[bytes]:
        """The prompt's last token is always run."""
        return self.keys(request)[: (request.seq.num_prompt - 1) // self._chunk]

    def _shared(self, request: Request, other: Request) -> int:
        """Tokens that two prompts have in common, in whole chunks."""
        if other is request:
            return 0
        return self._chunk * common(self._usable(request), self.keys(other))

    def _ready(self, request: Request, other: Request) -> int:
        """Those of them that are computed."""
        return min(self._shared(request, other), self._computed(other))

    def _computed(self, request: Request) -> int:
        """Tokens of a request's prompt that are stored as a prompt's are computed, in whole chunks."""
        most = min(request.known, request.seq.num_prompt)
        if request.cached != request.exact or request.exact % self._chunk:
            most = min(most, request.exact)
        return most // self._chunk * self._chunk
