"""What one run has told and the record has not yet: in order, one append on its way, what is large kept elsewhere first."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
import stamina

from chassis import lifecycle, log
from netra import errors, ids
from netra.events.v1 import events_pb2
from netra.tool import Artifact
from services.dispatcher.tools import results

_log = log.get(__name__)
_MAX_ENTRIES = 128
_MAX_BYTES = 512 * 1024
# what the data of an event may have with all its fields: each of them is at most results.INLINE_BYTES
_MAX_EVENT = results.INLINE_BYTES + 32 * 1024
# so far may an agent be ahead of its record: this many entries, for this long
_MAX_WAITING = 64
_LATE_S = 0.5
# so long waits what may for what comes next, to be recorded together with it: nobody sees that it does
_HELD_S = 0.015
# and so long what is only to go with a step that follows at once
_BRIEF_S = 0.002
# what waits is sent before it is so much that the run would be held up by it
_ENOUGH, _ENOUGH_BYTES = _MAX_WAITING // 2, _MAX_BYTES // 4
_MOST_SHOWN_BYTES = 16 * 1024
_TEXT = "text/plain; charset=utf-8"
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)
# of an artifact: what it comes from, its name, media type and content
Keep = Callable[[str, str, str, bytes], Awaitable[Artifact]]


class Appends(Protocol):
    """Where appends go."""

    def append(self, request: events_pb2.AppendRequest, user_id: str, token: Callable[[], str] | None = None) -> asyncio.Future[None]:
        """Done when the append is committed; fails with the error it was refused with. `token` is asked each time it is sent."""
        ...

    def show(self, request: events_pb2.AppendRequest, user_id: str) -> None:
        """Send what is not recorded, if there is somebody to send it to just now."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """A run that is not open in the record yet: its first append opens it, or `apart`, where that cannot be done so.

    It belongs to this trace, and the record tells of its opening under this span.
    """

    trace_id: str
    span_id: str
    apart: Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Owned:
    """A run that this process owns: whose it is, at which epoch, and its context token as it is now.

    `leased_until` is the end of its lease by the monotonic clock; 0 when that is not known. `moved` is told of each append that
    brought events into the record. `opening` is how it is opened there, unless it was; `call` which one it is of a session's calls, whose
    context it is in then.
    """

    run_id: ids.RunId
    user_id: ids.UserId
    epoch: int
    token: Callable[[], str]
    keep: Keep
    leased_until: Callable[[], float] = lambda: 0.0
    moved: Callable[[], None] = lambda: None
    opening: Opening | None = None
    call: events_pb2.Call | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """An event, a step, or an event with the step it belongs to: recorded together or not at all. `end` marks a run's last one.

    `fits` says that what is large in it has been put elsewhere, `held` that it may wait a moment for what comes next, `brief` that it
    may do so for a step that follows at once. A step that `opens` the one of this key says that it begins: nobody needs it when the
    append has that one as well.
    """

    event: events_pb2.NewEvent | None
    step: events_pb2.Step | None = None
    end: bool = False
    fits: bool = False
    held: bool = False
    brief: bool = False
    opens: str = ""

    @property
    def size(self) -> int:
        """Bytes of what it carries."""
        return (len(self.event.data) if self.event else 0) + (len(self.step.result) if self.step else 0)

    @property
    def is_large(self) -> bool:
        """Whether parts of it may have to be kept elsewhere."""
        return not self.fits and self.event is not None and len(self.event.data) > results.INLINE_BYTES


class Outbox:
    """The record of one run, from its owner's side."""

    def __init__(self, to: Appends, run: Owned, next_seq: int) -> None:
        self._appender, self._run, self._next_seq = to, run, next_seq
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._busy: asyncio.Future[None] | None = None
        self._since = 0.0
        # events and entries of the append that is on its way
        self._on_its_way = self._entries_on_their_way = 0
        self._beside: set[asyncio.Future[None]] = set()
        self._moved = asyncio.Event()
        # nothing more is recorded: the record refused something, another owns the run, or it was closed
        self._broken: BaseException | None = None
        self._ended = False
        # when what waits is to go at the latest, by the clock of the loop; there is a timer while nothing else sees to that
        self._due_at = math.inf
        self._timer: tuple[float, asyncio.TimerHandle] | None = None
        # entries that were told, and those that are recorded
        self._told = self._recorded = 0
        # its owner stops what it runs, and another goes on: what is told from now on is not how it went
        self._left = False
        self._tasks = lifecycle.Tasks(on_failure=lambda _error: None)
        # something of the run is in the record
        self._begun = next_seq > 1
        self._opening = run.opening
        # what is to be shown of a run that nobody knows there yet
        self._unshown: list[events_pb2.AppendRequest] = []

    @property
    def left(self) -> bool:
        """Whether nothing more is taken, as the process lets go of the run."""
        return self._left

    @property
    def waiting(self) -> tuple[int, int]:
        """How many entries, and bytes of them, are not on their way yet."""
        return len(self._entries), self._bytes

    @property
    def has_large(self) -> bool:
        """Whether parts of what waits may have to be kept elsewhere."""
        return any(entry.is_large for entry in self._entries)

    @property
    def unanswered_s(self) -> float:
        """Since when the append that is on its way is."""
        return 0.0 if self._busy is None else time.monotonic() - self._since

    async def barrier(self) -> None:
        """Returns when everything told so far is in the record. Raises what it was refused with."""
        told = self._told
        self._release()
        while self._recorded < told and self._broken is None:
            await self._moved.wait()
        for answered in tuple(self._beside):
            await asyncio.wait({answered})
        if self._broken is not None:
            raise self._broken

    async def begun(self) -> None:
        """Returns when the begin of the run is in the record, or there is none that was told. Raises what it was refused with."""
        while not self._begun and (self._entries or self._busy is not None) and self._broken is None:
            self._release()
            await self._moved.wait()
        if self._broken is not None:
            raise self._broken

    async def room(self) -> None:
        """Returns when the run may go on: not much waits, and the record answers. Raises what the record refused something with."""
        # whoever only takes steps lets others go on at each
        await asyncio.sleep(0)
        while self._broken is None and (self._told - self._recorded >= _MAX_WAITING or self.unanswered_s > _LATE_S):
            await self._moved.wait()
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        if self._left:
            raise errors.Fenced("The process lets go of the run.")
        if self._ended:
            raise _over()

    def mend(self) -> None:
        """Forget what the record refused, and what came after it; go on with the seq that was refused."""
        self._entries.clear()
        self._bytes = 0
        self._recorded = self._told
        self._broken, self._ended = None, False

    def leave(self) -> None:
        """Send what was told so far, and take nothing more: whoever takes the run over finds it as it is now."""
        self._left = True
        self._release()

    async def close(self) -> None:
        """Keep nothing any more."""
        self._broken = self._broken or _over()
        self._set_timer(None)
        self._move()
        await self._tasks.close()

    def add(self, entry: Entry) -> None:
        """Record an entry after all that came before; nothing after the end, or after something that was refused."""
        if self._broken is not None or self._ended or self._left:
            return
        self._ended = entry.end
        self._entries.append(entry)
        self._told += 1
        self._bytes += entry.size
        self._due_at = min(self._due_at, self._latest(entry))
        self._send()

    def _latest(self, entry: Entry) -> float:
        """When an entry that was just added is to be sent at the latest."""
        if not (entry.held or entry.brief) or len(self._entries) >= _ENOUGH or self._bytes >= _ENOUGH_BYTES:
            return 0.0
        return asyncio.get_running_loop().time() + (_BRIEF_S if entry.brief else _HELD_S)

    def add_beside(self, event: events_pb2.NewEvent) -> None:
        """Record an event of the user's that belongs to no run, which goes on when it is refused."""
        if self._broken is not None:
            return
        request = events_pb2.AppendRequest(events=[event], call=self._run.call)
        answered = self._appender.append(request, self._run.user_id, self._run.token)
        self._beside.add(answered)
        answered.add_done_callback(functools.partial(self._noted, event.type))

    def show(self, kind: str, data: bytes) -> None:
        """Show something to those who watch now; dropped when it is large, or the record does not answer."""
        if len(data) > _MOST_SHOWN_BYTES or self._broken is not None or self._ended or self.unanswered_s > _LATE_S:
            return
        self._release()
        shown = events_pb2.Transient(type=kind, data=data, after_seq=self._last_seq())
        request = events_pb2.AppendRequest(run_id=self._run.run_id, epoch=self._run.epoch, transients=[shown])
        if self._opening is None:
            self._appender.show(request, self._run.user_id)
        elif len(self._unshown) < _MAX_WAITING:
            self._unshown.append(request)

    def _last_seq(self) -> int:
        # of events that are told, whether or not they are recorded already
        return self._next_seq - 1 + self._on_its_way + sum(entry.event is not None for entry in self._entries)

    def _noted(self, kind: str, answered: asyncio.Future[None]) -> None:
        self._beside.discard(answered)
        if not answered.cancelled() and (refused := answered.exception()) is not None:
            _log.error("the record refused an event beside a run", kind=kind, run_id=self._run.run_id, reason=str(refused))

    def _send(self) -> None:
        if self._busy is not None or self._broken is not None:
            return
        if not self._entries:
            self._move()
            return
        if self._due_at > asyncio.get_running_loop().time():
            self._set_timer(self._due_at)
            return
        self._set_timer(None)
        self._since = time.monotonic()
        if self._entries[0].is_large:
            self._busy = self._tasks.spawn(self._shrink(), name="keep what is large")
        else:
            waiting, request = len(self._entries), self._next_append()
            self._on_its_way, self._entries_on_their_way = len(request.events), waiting - len(self._entries)
            self._busy = self._appended(request)
        # what one append does not hold has waited long enough
        self._due_at = 0.0 if self._entries else math.inf
        self._busy.add_done_callback(self._answered)
        self._move()

    def _appended(self, request: events_pb2.AppendRequest) -> asyncio.Future[None]:
        if self._opening is None:
            return self._appender.append(request, self._run.user_id)
        request.open.trace_id, request.open.parent_id = self._opening.trace_id, self._opening.span_id
        if self._run.call is not None:
            request.call.CopyFrom(self._run.call)
        return self._tasks.spawn(self._opened(request, self._opening), name="open the record of the run")

    async def _opened(self, request: events_pb2.AppendRequest, opening: Opening) -> None:
        """Returns when the run is open in the record, with its first append."""
        try:
            await self._appender.append(request, self._run.user_id, self._run.token)
        except errors.NotFound:
            # an older service knows no append that opens
            await opening.apart()
            request.ClearField("open")
            request.ClearField("call")
            await self._appender.append(request, self._run.user_id)
        self._opening = None
        for waiting in self._unshown:
            self._appender.show(waiting, self._run.user_id)
        self._unshown.clear()

    def _set_timer(self, at: float | None) -> None:
        if self._timer is not None:
            if self._timer[0] == at:
                return
            self._timer[1].cancel()
        self._timer = None if at is None else (at, asyncio.get_running_loop().call_at(at, self._release))

    def _release(self) -> None:
        """Nothing is held any longer."""
        if self._entries:
            self._due_at = 0.0
            self._send()

    def _next_append(self) -> events_pb2.AppendRequest:
        request = events_pb2.AppendRequest(run_id=self._run.run_id, epoch=self._run.epoch, first_seq=self._next_seq)
        size, steps = 0, list[tuple[events_pb2.Step, str]]()
        for _ in range(_MAX_ENTRIES):
            if not self._entries or self._entries[0].is_large or (size and size + self._entries[0].size > _MAX_BYTES):
                break
            entry = self._entries.popleft()
            size += entry.size
            request.events.extend([entry.event] if entry.event is not None else [])
            steps += [(entry.step, entry.opens)] if entry.step is not None else []
            if entry.end:
                request.end = True
                break
        self._bytes -= size
        keys = {step.key for step, opens in steps if not opens}
        request.steps.extend(step for step, opens in steps if opens not in keys)
        return request

    def _answered(self, done: asyncio.Future[None]) -> None:
        self._busy = None
        refused = asyncio.CancelledError() if done.cancelled() else done.exception()
        if refused is None:
            self._next_seq += self._on_its_way
            self._recorded += self._entries_on_their_way
            if self._on_its_way:
                self._begun = True
                self._run.moved()
        self._broken, self._on_its_way, self._entries_on_their_way = self._broken or refused, 0, 0
        self._move()
        self._send()

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _shrink(self) -> None:
        entry = self._entries[0]
        small = await self._small(entry)
        # nothing but a mend takes from the front meanwhile
        if self._entries and self._entries[0] is entry:
            self._entries[0] = small
            self._bytes += small.size - entry.size

    async def _small(self, entry: Entry) -> Entry:
        if entry.event is None:
            return entry
        data: dict[str, Any] = orjson.loads(entry.event.data)
        # the result of a step with an event is null, or an object with some of the event's fields
        kept: dict[str, Any] = (orjson.loads(entry.step.result) if entry.step is not None else None) or {}
        sizes = {name: len(orjson.dumps(value)) for name, value in data.items()}
        while sizes and (max(sizes.values()) > results.INLINE_BYTES or len(orjson.dumps(data)) > _MAX_EVENT):
            field = max(sizes, key=lambda name: sizes[name])
            del sizes[field]
            instead = await self._elsewhere(entry.event, field, data.pop(field))
            data |= instead
            if kept.pop(field, None) is not None:
                kept |= instead
        event = events_pb2.NewEvent()
        event.CopyFrom(entry.event)
        event.data = orjson.dumps(data)
        step = None if entry.step is None else events_pb2.Step(key=entry.step.key, result=orjson.dumps(kept or None))
        return dataclasses.replace(entry, event=event, step=step, fits=True)

    async def _elsewhere(self, event: events_pb2.NewEvent, field: str, value: Any) -> Mapping[str, Any]:
        """The fields that stand for one that is kept as an artifact. Raises what stands against keeping it."""
        is_text = isinstance(value, str)
        text = value.encode() if is_text else orjson.dumps(value)
        if len(text) < results.PREVIEW_BYTES or len(text) > results.MAX_BYTES:
            raise errors.TooLarge(
                f"{event.type}: data.{field} has {len(text)} bytes; the record takes no such event.", field=f"data.{field}"
            )
        name, media_type = (f"{field}.txt", _TEXT) if is_text else (f"{field}.json", results.MEDIA_TYPE)
        # the run waits, as for the record itself
        async for attempt in stamina.retry_context(on=_AWAY, attempts=None, timeout=None, wait_initial=0.1, wait_max=1.0):
            with attempt:
                artifact = await self._run.keep(f"{event.event_id}:{field}", name, media_type, text)
        preview = "preview" if field == "result" else f"{field}_preview"
        return {f"{field}_ref": results.reference(artifact), preview: results.preview_of(text)}


def _over() -> errors.NetraError:
    return errors.FailedPrecondition("The run has ended; nothing more is told of it.")
