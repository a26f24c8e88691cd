"""Adapters as the front end handles them: look-ups off the event loop, and what the engine has been told of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from segue.engine.lora.catalog import AdapterCatalog, CatalogEntry, OpenedVersion
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.messages import State
from segue.errors import AdapterPinnedError, EngineUnavailableError, SegueError
from segue.server.engine_client import EngineClient
from segue.server.engine_life import EngineLife
from segue.types import AdapterInfo, Tier

_LOG = logging.getLogger(__name__)
_PIN_POLL_SECONDS = 0.02


class PinError(Exception):
    """Pinned adapters cannot be served. The message is one line for the operator."""


async def run_holding(executor: Executor, open_version: Callable[[], OpenedVersion]) -> OpenedVersion:
    """Run ``open_version`` on a thread; if this is cancelled meanwhile, the hold that it brings is closed."""
    future = executor.submit(open_version)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(_close_result)
        raise


def _close_result(future: Future[OpenedVersion]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


class AdapterDirectory:
    """The catalog, and the versions of it that the engine knows. Used on one event loop only.

    Every version of a ``pinned`` name is told to the engine as pinned.
    """

    def __init__(
        self, catalog: AdapterCatalog, engine: EngineClient, executor: Executor, pinned: Sequence[str] = ()
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._executor = executor
        self._pinned = frozenset(pinned)
        self._pins_told = False
        self._in_engine: dict[int, AdapterManifest] = {}

    async def lookup(self, name: str, version: str | None = None) -> OpenedVersion:
        """Hold a version, off the event loop; raises as AdapterCatalog.lookup. Give it back with ``release``."""
        return await run_holding(self._executor, lambda: self._catalog.lookup(name, version))

    def hand_over(self, opened: OpenedVersion, life: EngineLife) -> int:
        """Make sure that the engine knows a version; its id. Raises EngineUnavailableError."""
        manifest = opened.manifest
        descriptor = opened.fileno
        if descriptor is not None:
            life.open_version(manifest, descriptor, pinned=manifest.name in self._pinned)
            opened.handed_over()
            self._in_engine[manifest.version_id] = manifest
        return manifest.version_id

    def release(self, opened: OpenedVersion) -> None:
        """End a hold, and tell the engine of the versions that no request will name again."""
        opened.close()
        self._close_retired()

    async def pin(self, wait_seconds: float) -> None:
        """Hand over every pinned adapter and wait until all are on the device, once for each engine.

        Raises PinError when some are unknown, cannot be served or are not there after ``wait_seconds``, and
        EngineUnavailableError.
        """
        if self._pins_told or not self._pinned:
            return
        self._pins_told = True
        await self._hand_over_pinned()
        has_landed = True
        try:
            await asyncio.wait_for(self._pinned_landed(), wait_seconds)
        except TimeoutError:
            has_landed = False
        problems = await self._hand_over_pinned()
        if not has_landed:
            problems.append(f"not all are on the device after {wait_seconds:g} s")
        if problems:
            raise PinError(f"pinned_adapters: {'; '.join(problems)}")

    async def _hand_over_pinned(self) -> list[str]:
        """What is wrong with pinned adapters."""
        problems = []
        for name in sorted(self._pinned):
            try:
                opened = await self.lookup(name)
            except SegueError as error:
                problems.append(f"{name}: {error.message}")
                continue
            try:
                self.hand_over(opened, self._engine.life)
            finally:
                self.release(opened)
        return problems

    async def _pinned_landed(self) -> None:
        """Wait until every pinned version is on the device, except for those that the engine has dropped."""
        pinned = {version_id for version_id, manifest in self._in_engine.items() if manifest.name in self._pinned}
        while True:
            versions = (await self._engine.life.state()).versions
            if all(item.tier is Tier.DEVICE for item in versions if item.version_id in pinned):
                break
            await asyncio.sleep(_PIN_POLL_SECONDS)
        # The engine tells why it dropped a version after the step in which it did: before its next answer.
        await self._engine.life.state()

    async def load(self, name: str, path: str, *, preload: bool) -> AdapterInfo:
        """Make ``name`` known, and with ``preload`` bring its weights to the device.

        Raises as AdapterCatalog.load. An adapter that could never fit raises AdapterRejectedError; ``name`` stands for
        it nevertheless. Without a living engine that is not looked at, and ``preload`` raises EngineUnavailableError.
        """
        opened = await run_holding(self._executor, lambda: self._catalog.load(name, path))
        try:
            with contextlib.nullcontext() if preload else contextlib.suppress(EngineUnavailableError):
                life = self._engine.life
                version_id = self.hand_over(opened, life)
                if preload:
                    life.preload(version_id)
                await life.state()
            # The engine has told why it dropped a version before this second answer, and so the look-up meets it.
            tiers = await self._tiers()
            self.release(await self.lookup(name))
            entry = CatalogEntry(name=name, manifest=opened.manifest, problem=None, users=0)
            return self._info(entry, tiers)
        finally:
            self.release(opened)

    async def unload(self, name: str) -> None:
        """Forget ``name``; raises as AdapterCatalog.unload."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._catalog.unload, name)
        self._close_retired()

    async def evict(self, name: str) -> None:
        """Drop the weights of the version that ``name`` stands for.

        Raises as AdapterCatalog.lookup, and AdapterPinnedError for a pinned name.
        """
        opened = await self.lookup(name)
        try:
            if name in self._pinned:
                raise AdapterPinnedError(f"adapter {name!r} is pinned to the device by the server's configuration")
            version_id = opened.manifest.version_id
            if version_id in self._in_engine:
                self._engine.life.evict(version_id)
        finally:
            self.release(opened)

    async def list_adapters(self) -> list[AdapterInfo]:
        """Every adapter, by name."""
        loop = asyncio.get_running_loop()
        entries = await loop.run_in_executor(self._executor, self._catalog.list)
        self._close_retired()
        tiers = await self._tiers()
        return [self._info(entry, tiers) for entry in entries]

    def resident(self, state: State) -> list[tuple[AdapterManifest, Tier, int]]:
        """The versions of a snapshot that requests may name, each with its tier and its users."""
        return [
            (self._in_engine[version.version_id], version.tier, version.users)
            for version in state.versions
            if version.version_id in self._in_engine
        ]

    def version_failed(self, version_id: int, problem: str, may_pass: bool) -> None:
        """The engine found that a version cannot be served; ``may_pass``: not because of its content."""
        manifest = self._in_engine.get(version_id)
        if manifest is not None and manifest.name in self._pinned:
            _LOG.error("pinned adapter %r cannot be served: %s", manifest.name, problem)
        if may_pass:
            self._catalog.reopen(version_id)
        else:
            self._catalog.reject(version_id, problem)

    def engine_lost(self) -> None:
        """The engine is gone, and with it all that it knew."""
        self._in_engine.clear()
        self._pins_told = False
        self._catalog.engine_restarted()

    async def _tiers(self) -> dict[int, Tier]:
        """Tiers by version id; without a living engine every adapter is on disk."""
        with contextlib.suppress(EngineUnavailableError):
            state = await self._engine.life.state()
            return {version.version_id: version.tier for version in state.versions}
        return {}

    def _close_retired(self) -> None:
        for version_id in self._catalog.take_retired():
            if self._in_engine.pop(version_id, None) is not None:
                with contextlib.suppress(EngineUnavailableError):
                    self._engine.life.close_version(version_id)

    def _info(self, entry: CatalogEntry, tiers: dict[int, Tier]) -> AdapterInfo:
        pinned = entry.name in self._pinned
        manifest = entry.manifest
        if manifest is None:
            problem = "" if entry.problem is None else entry.problem.message
            return AdapterInfo(
                name=entry.name,
                version="",
                tier=Tier.DISK,
                rank=0,
                target_modules=(),
                weight_bytes=0,
                users=0,
                problem=problem,
                pinned=pinned,
            )
        modules = {module.projection.value: None for layer in manifest.layers for module in layer}
        return AdapterInfo(
            name=entry.name,
            version=manifest.version,
            tier=tiers.get(manifest.version_id, Tier.DISK),
            rank=manifest.max_rank,
            target_modules=tuple(modules),
            weight_bytes=manifest.weight_bytes,
            users=entry.users,
            pinned=pinned,
        )
