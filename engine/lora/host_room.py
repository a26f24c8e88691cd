"""Room in the host store: who waits for it, and whose host copy goes for whom."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from segue.engine.lora.mover import WeightMover
from segue.engine.lora.states import Adapter, ReadPhase


class HostRoom:
    """The adapters that are WAITING, in the order of their arrival. ``adapters`` are all that there are."""

    def __init__(self, mover: WeightMover, adapters: Mapping[int, Adapter]) -> None:
        self._mover = mover
        self._adapters = adapters
        self._waiting: dict[int, Adapter] = {}

    def wait(self, adapter: Adapter) -> None:
        """Have an UNREAD adapter read, as soon as there is room."""
        adapter.move_phase(ReadPhase.WAITING)
        self._waiting[adapter.version_id] = adapter
        self.start_reads()

    def stop_waiting(self, adapter: Adapter) -> None:
        """Nobody wants a WAITING adapter any more."""
        del self._waiting[adapter.version_id]
        adapter.move_phase(ReadPhase.UNREAD)

    def start_reads(self) -> None:
        """Start the reads for which there is room: those that passes depend on first, then in order of arrival."""
        for adapter in sorted(self._waiting.values(), key=lambda each: each.device is None):
            offset = self._make_room(adapter)
            if offset is None:
                return
            del self._waiting[adapter.version_id]
            self._mover.start_read(adapter, offset)

    def clear(self) -> None:
        """Nothing is read any more."""
        self._waiting.clear()

    def check(self) -> None:
        """Raises AssertionError unless those that wait are those whose phase says so."""
        waiting = {adapter.version_id for adapter in self._adapters.values() if adapter.phase is ReadPhase.WAITING}
        assert self._waiting.keys() == waiting, f"{sorted(self._waiting)} wait for room, {sorted(waiting)} say so"

    def _make_room(self, adapter: Adapter) -> int | None:
        """The offset of an extent for the adapter; evicts as many unused host copies as that takes, oldest first."""
        size = adapter.plan.host_bytes
        offset = self._mover.extents.allocate(size)
        if offset is not None:
            return offset
        leaving = self._mover.leaving_offsets
        victims = self._victims(adapter)
        offsets = [victim.host.offset for victim in victims if victim.host is not None]
        count = bisect_left(
            range(len(victims) + 1),
            True,
            key=lambda taken: self._mover.extents.fits_without(size, [*leaving, *offsets[:taken]]),
        )
        if count > len(victims):
            return None
        for victim in victims[:count]:
            self._mover.drop_host(victim)
        return self._mover.extents.allocate(size)

    def _victims(self, adapter: Adapter) -> list[Adapter]:
        """Versions whose host copy may go for this one. What a queued request will need goes last, and only for one
        that a pass depends on: else two that wait could take each other's bytes for ever."""
        victims = [
            other
            for other in self._adapters.values()
            if other.host is not None
            and not other.needs_host
            and (adapter.device is not None or other.users == 0 or other.device is not None)
        ]
        return sorted(victims, key=lambda other: (other.users > 0 and other.device is None, other.last_used_seconds))
