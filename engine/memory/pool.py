"""The unified page pool: one page id stands for the same page of every layer, for KV or adapter weights.

After S-LoRA's unified paging (Sheng et al., 2023, arXiv:2311.03285): a page holds either the K and V of ``page_tokens``
tokens or the same number of elements of adapter weights, so that both trade space page by page.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from segue.engine.memory.pages import PageAllocator


class PagePool:
    """The pages of one device.

    ``data`` is [layers, pages + 1, page_elems] with ``page_elems = 2 * page_tokens * kv_heads * head_dim``. The page
    behind the last, ``padding_page``, is never given out: rows that only fill a batch up write there. Pages are not
    cleared: a fresh page holds anything, NaN included, so readers must keep unwritten elements out of their results.
    ``poison_freed`` fills fresh and freed pages with NaN, so that a test sees whoever reads them.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        poison_freed: bool = False,
    ) -> None:
        for name, value in (("layers", layers), ("page_tokens", page_tokens), ("kv_heads", kv_heads)):
            if value <= 0:
                raise ValueError(f"{name}: must be greater than 0, is {value}")
        if head_dim <= 0:
            raise ValueError(f"head_dim: must be greater than 0, is {head_dim}")
        self.layers = layers
        self.pages = pages
        self.page_tokens = page_tokens
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.page_elems = 2 * page_tokens * kv_heads * head_dim
        self.poison_freed = poison_freed
        self._allocator = PageAllocator(pages)
        self._owners: dict[int, str] = {}
        self.data = torch.empty(layers, pages + 1, self.page_elems, dtype=dtype, device=device)
        if poison_freed:
            self.data.fill_(torch.nan)

    @property
    def free_pages(self) -> int:
        """How many pages are free."""
        return self._allocator.free_pages

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the pages."""
        return self.data.dtype

    @property
    def padding_page(self) -> int:
        """The page for rows that nobody asked for."""
        return self.pages

    def token_pages(self, tokens: int) -> int:
        """How many pages the KV of ``tokens`` tokens takes."""
        return -(-tokens // self.page_tokens)

    def layer(self, layer: int) -> Tensor:
        """One layer's pages: a view [pages + 1, page_elems]."""
        return self.data[layer]

    def kv(self, layer: int) -> Tensor:
        """One layer's keys (index 0) and values (1): a view [pages + 1, 2, page_tokens, kv_heads, head_dim]."""
        return self.data[layer].view(-1, 2, self.page_tokens, self.kv_heads, self.head_dim)

    def allocate(self, count: int, owner: str) -> tuple[int, ...]:
        """Take ``count`` pages for ``owner``, all or none. Raises OutOfPagesError."""
        pages = self._allocator.allocate(count)
        self._owners.update(dict.fromkeys(pages, owner))
        return pages

    def hand_over(self, page: int, owner: str) -> None:
        """A page that is taken belongs to ``owner`` from now on. Raises ValueError if it is free."""
        if page not in self._owners:
            raise ValueError(f"page {page} is free")
        self._owners[page] = owner

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back; nothing in flight may refer to them. Raises ValueError if one is free already."""
        returned = tuple(pages)
        self._allocator.free(returned)
        for page in returned:
            del self._owners[page]
        if self.poison_freed and returned:
            self.data.index_fill_(1, torch.tensor(returned, device=self.data.device), torch.nan)

    def owned(self) -> dict[int, str]:
        """The owner of every page that is taken."""
        return dict(self._owners)

    def check(self) -> None:
        """Raise AssertionError unless every page is either free or has one owner."""
        self._allocator.check()
        for page in range(self.pages):
            free = self._allocator.is_free(page)
            assert free != (page in self._owners), f"page {page}: free={free}, owner={self._owners.get(page)!r}"
