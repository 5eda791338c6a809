"""The tier `script`: model-written code in the Monty interpreter, in a process of its owner's behind walls, warm for the next call."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sysconfig
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import orjson

from chassis import lifecycle, log
from netra import errors
from services.dispatcher.tools.sandbox import guardian, hosts, probe_script, tiers

_log = log.get(__name__)
_TELLING_CHARS = 2048
_MOST_GIVEN = 64 * 1024 * 1024
# ids that nobody has; a host and its interpreter have one of their own when the dispatcher is root
_UIDS = range(210_000, 220_000)


class Script:
    """Hosts of the interpreter, each a pair of processes that serves one owner until it is retired: no heap is ever shared by two.

    At most `most` calls run at once. `spares` hosts that have served nobody are kept ready, and at most `kept` that wait for their
    owner's next call, each for `idle_s` seconds and for `runs` calls. All end with the process whose `watch` this is. `uids` are used
    when this is root, one for each host.
    """

    def __init__(
        self, watch: guardian.Guardian, *, most: int = 8, spares: int = 1, kept: int = 16, runs: int = 1000, idle_s: float = 120.0,
        binary: Path | None = None, uids: range = _UIDS,
    ) -> None:  # fmt: skip
        self._guardian = watch
        self._spares_wanted, self._kept, self._runs, self._idle_s = spares, kept, runs, idle_s
        self._binary = binary or Path(sysconfig.get_path("scripts")) / "monty"
        self._slots = asyncio.Semaphore(most)
        self._own_user, self._uids = os.geteuid() == 0, list(uids)
        self._facts: Mapping[str, object] = {}
        self._template: hosts.Template | None = None
        self._why_not = "The interpreter of scripts is not started."
        self._spares: list[hosts.Host] = []
        self._warm: defaultdict[str, list[hosts.Host]] = defaultdict(list)
        # those that are warm, the one that waits longest first
        self._waiting: dict[hosts.Host, None] = {}
        self._hosts: set[hosts.Host] = set()
        self._refilling = asyncio.Lock()
        self._tasks = lifecycle.Tasks(on_failure=lambda error: _log.warning("a host of scripts did not start", error=str(error)))

    async def start(self) -> None:
        """Raises `SandboxUnavailable`."""
        try:
            self._template = hosts.Template(self._binary)
            await self._refill()
        except errors.SandboxUnavailable as error:
            self._why_not = error.message
            raise

    async def run(self, job: tiers.Job) -> tiers.Ended:
        """See `tiers.Sandbox.run`."""
        try:
            async with asyncio.timeout(job.limits.wall_s):
                files = await asyncio.to_thread(_given, job) if os.listdir(job.folder) else {}
                async with self._slots:
                    host = await self._taken(job.owner)
                    try:
                        job.begins()
                        head, result = await host.ask(_request(job, files), files.values(), job.limits.output)
                    except BaseException:
                        await self._ended(host)
                        raise
        except TimeoutError as late:
            raise errors.DeadlineExceeded(f"The script did not finish within {job.limits.wall_s:g} s.") from late
        problem = head.get("problem")
        if problem is None:
            self._released(host, job.owner)
            return tiers.Ended(result, str(head.get("output", "")), bool(head.get("cut")))
        if not isinstance(problem, dict):
            problem = {"crashed": problem}
        if "error" in problem:
            self._released(host, job.owner)
        else:  # after a limit nothing is promised about the interpreter
            await self._ended(host)
        raise _error(problem, job.limits, str(head.get("output", "")))

    async def probe(self) -> tiers.Availability:
        """See `tiers.Sandbox.probe`."""
        found = await probe_script.probe(self, "monty")
        return dataclasses.replace(found, facts=self._facts)

    async def close(self) -> None:
        """End every host."""
        await self._tasks.close()
        template, self._template = self._template, None
        await asyncio.gather(*(self._ended(host) for host in list(self._hosts)))
        if template is not None:
            template.close()

    async def _taken(self, owner: str) -> hosts.Host:
        """A host that has served this owner or nobody."""
        while found := self._warm.get(owner) or self._spares:
            host = found.pop()
            host.rest()
            self._waiting.pop(host, None)
            if found is self._spares:
                self._tasks.spawn(self._refill(), name="spare hosts of scripts")
            if host.lives():
                return host
            await self._ended(host)  # while it waited
        making = self._tasks.spawn(self._made(), name="host of scripts")
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self._left_over)
            raise

    def _left_over(self, making: asyncio.Task[hosts.Host]) -> None:
        if not making.cancelled() and making.exception() is None:
            self._spares.append(making.result())

    def _released(self, host: hosts.Host, owner: str) -> None:
        """Keep it for its owner, or end it."""
        host.runs += 1
        if not owner or host.runs >= self._runs or self._template is None:
            self._tasks.spawn(self._ended(host), name="end of a host of scripts")
            return
        self._warm[owner].append(host)
        host.wait(self._idle_s, lambda: self._tasks.spawn(self._ended(host), name="end of an idle host of scripts"))
        self._waiting[host] = None
        while len(self._waiting) > self._kept:
            oldest = next(iter(self._waiting))
            self._forget(oldest)
            self._tasks.spawn(self._ended(oldest), name="end of the host of scripts that waited longest")

    async def _made(self) -> hosts.Host:
        if self._template is None:
            raise errors.SandboxUnavailable(self._why_not, remedy=hosts.REMEDY)
        if self._template.ended:
            self._template = hosts.Template(self._binary)
        self._guardian.door()  # it must be there before anything is that it has to end
        if self._own_user and not self._uids:  # never as root
            raise errors.Unavailable("No user of the machine is left for another host of scripts.")
        uid = self._uids.pop(0) if self._own_user else None
        try:
            host = await self._template.host(uid)
        except BaseException:
            if uid is not None:
                self._uids.append(uid)
            raise
        self._guardian.guard(host.group)
        self._hosts.add(host)
        # nothing that a script does gets to a disk
        self._facts = {**host.facts, "disk_quota": True}
        return host

    async def _refill(self) -> None:
        async with self._refilling:
            while len(self._spares) < self._spares_wanted:
                self._spares.append(await self._made())

    async def _ended(self, host: hosts.Host) -> None:
        """Kill it and return when it is gone, whoever is cancelled meanwhile."""
        self._forget(host)
        host.kill()
        await _surely(host.gone())
        if host in self._hosts:
            self._hosts.discard(host)
            self._guardian.release(host.group)
            host.close()
            if host.uid is not None:
                self._uids.append(host.uid)

    def _forget(self, host: hosts.Host) -> None:
        """It waits for nobody any more."""
        self._waiting.pop(host, None)
        if host in self._spares:
            self._spares.remove(host)
        for owner, warm in list(self._warm.items()):
            if host in warm:
                warm.remove(host)
            if not warm:
                del self._warm[owner]


def _request(job: tiers.Job, files: Mapping[str, bytes]) -> dict[str, Any]:
    limits = job.limits
    return {
        "code": job.code,
        "arguments": orjson.Fragment(job.arguments or b"{}"),
        "environment": dict(job.environment),
        "memory": limits.memory,
        "cpu_s": limits.cpu_s,
        "output": limits.output,
        "files": {name: len(content) for name, content in files.items()},
    }


def _given(job: tiers.Job) -> dict[str, bytes]:
    """The files of the call by their names in its folder; a link is none."""
    found, left = dict[str, bytes](), min(job.limits.disk, _MOST_GIVEN)
    for path in sorted(job.folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if (left := left - path.stat().st_size) < 0:
            raise errors.ResourceExhausted("The files that the script was given are too large.", limit="disk")
        found[path.relative_to(job.folder).as_posix()] = path.read_bytes()
    return found


def _error(problem: Mapping[str, Any], limits: tiers.Limits, printed: str) -> errors.NetraError:
    """What a host says went wrong, as an error, with the end of what was printed."""
    error = _said(problem, limits)
    if printed:
        error.details["output"] = printed[-_TELLING_CHARS:]
    return error


def _said(problem: Mapping[str, Any], limits: tiers.Limits) -> errors.NetraError:
    if limit := problem.get("limit"):
        most = {"memory": f"{limits.memory} bytes of memory", "output": f"{limits.output} bytes of output"}
        what = most.get(limit, f"{limits.cpu_s:g} s of processor time")
        return errors.ResourceExhausted(f"The script took more than {what}.", limit=limit)
    if "error" not in problem:
        return errors.ToolFailed(f"The interpreter of the script ended: {problem.get('crashed')}")
    line = int(problem.get("line") or 0)
    where = f" (line {line})" if line else ""
    return errors.ToolFailed(f"{problem['error']}: {problem.get('message', '')}{where}", error=problem["error"], line=line)


async def _surely(work: Coroutine[Any, Any, None]) -> None:
    """To the end, also when cancelled: raises that afterwards."""
    task, stopped = asyncio.get_running_loop().create_task(work), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as cancel:
            stopped = cancel
    task.result()
    if stopped is not None:
        raise stopped
