"""Full pages found again by the tokens they and all pages before them hold.

A page's name is a hash of its tokens chained to the name before it, so equal names mean equal prefixes and, as
a position's bits depend on its prefix alone, equal content. Knows names and page numbers; nothing of tensors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def first_name(salt: str) -> bytes:
    """What the first page's name is chained to: requests of different salts share no pages."""
    return hashlib.sha256(salt.encode()).digest()


def next_name(name: bytes, tokens: Sequence[int]) -> bytes:
    """Of the page that holds `tokens`, behind the page of `name`."""
    return hashlib.sha256(name + array("q", tokens).tobytes()).digest()


class PrefixIndex:
    """Named pages. Those that no sequence uses are kept until room is needed: the longest unused go first."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_unused(self) -> int:
        return len(self._unused)

    def find(self, name: bytes) -> int | None:
        return self._pages.get(name)

    def add(self, name: bytes, page: int) -> None:
        """Name a page that is in use; where another one has the name already, this one stays nameless."""
        if self._pages.setdefault(name, page) == page:
            self._names[page] = name

    def use(self, page: int) -> None:
        """A named page is in use again."""
        self._unused.pop(page, None)

    def leave(self, page: int) -> bool:
        """No sequence uses the page any more. Returns whether it is kept: it has a name.

        A sequence's last pages must be left first, so that a page goes before those that lead to it.
        """
        if page in self._names:
            self._unused[page] = None
        return page in self._names

    def evict(self) -> int:
        """Forget the page that is unused for longest."""
        page, _ = self._unused.popitem(last=False)
        del self._pages[self._names.pop(page)]
        return page
