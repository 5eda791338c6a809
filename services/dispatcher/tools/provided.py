"""What one call is given beside its arguments: files, secrets, a way to show progress, and a sandbox for foreign code."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol

import orjson

from netra import errors
from netra.context import UserExecutionContext
from netra.tool import Artifact, ToolSpec
from services.dispatcher.tools import arguments as given
from services.dispatcher.tools import calls, means, workspace
from services.dispatcher.tools.sandbox import tiers

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_LEAST_S = 0.05
_MAX_MESSAGE = 500
# a secret that is shorter stands in too many texts by chance
_MIN_SECRET = 6
_STARS = "***"


@dataclass(frozen=True, slots=True)
class Frame:
    """In what calls happen: whose they are, and where their files are. `apart`: no call shares anything with another."""

    context: UserExecutionContext
    files: workspace.Workspace
    means: means.Means
    apart: bool = False


class Hears(Protocol):
    """Who is told what happens during a call."""

    def attempted(self) -> None:
        """A function is about to be called for it."""

    def progress(self, percentage: float, message: str) -> None:
        """So much of it is done, 0 to 100."""

    def violated(self, spec: ToolSpec, error: errors.SecurityViolation) -> None:
        """What a tool ran has tried what is forbidden."""


class Provided:
    """`netra.tool.ToolContext` of one call of one tool. `until` is when its time is over, by the monotonic clock."""

    def __init__(
        self, frame: Frame, hears: Hears, call: calls.Call, spec: ToolSpec, until: float, effect_key: str,
        begins: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`begins` is called where something begins for the call, and raises `Fenced` when nothing may any more."""
        self._frame, self._hears, self._call, self._spec, self._until, self._begins = frame, hears, call, spec, until, begins
        self.effect_key = effect_key
        self._count = 0
        self._shown_at = -math.inf
        self._over = False

    @property
    def context(self) -> UserExecutionContext:
        """For whom and in what frame the call is made."""
        return self._frame.context

    @property
    def workspace(self) -> Path:
        """A folder of this run alone; it is removed when the run has ended. Of an isolated call: of this call alone."""
        return self._frame.files.of_call(self._call.tool_call_id) if self._frame.apart else self._frame.files.folder

    @property
    def left_s(self) -> float:
        """How much time the call has left."""
        return max(self._until - time.monotonic(), 0.001)

    async def fetch(self, artifact_id: str, to: Path) -> Artifact:
        """Write an artifact of the user to a file. Raises `NotFound`."""
        return await self._frame.files.fetch(artifact_id, to)

    async def keep(self, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Make an artifact of the user. Raises `TooLarge`, `InvalidPayload`."""
        return await self._frame.files.keep(self._call.tool_call_id, name, media_type, content)

    def progress(self, fraction: float, message: str = "") -> None:
        """Show how much is done, 0 to 1. Raises `ValueError` for another number. At most 20 a second are shown, and none after the end."""
        if not 0 <= fraction <= 1:
            raise ValueError("progress is a number from 0 to 1")
        now = time.monotonic()
        if not self._over and (fraction == 1 or now - self._shown_at >= _LEAST_S):
            self._shown_at = now
            self._hears.progress(round(fraction * 100, 3), message[:_MAX_MESSAGE])

    def secret(self, name: str) -> str:
        """A secret that was granted to the tool. Raises `PermissionDenied` for one that it does not declare, or was not granted."""
        if name not in self._spec.secrets:
            message = f"The tool {self._spec.name} does not declare the secret {name}."
            raise errors.PermissionDenied(message, tool=self._spec.name, secret=name)
        return self._frame.means.secret(self._spec.name, name)

    async def contained(
        self, *, code: str = "", argv: Sequence[str] = (), arguments: Mapping[str, Any] = _NOTHING,
        files: Mapping[str, bytes | Path] = _NOTHING,
    ) -> Any:  # fmt: skip
        """Run foreign code in the tier that the tool declares, and return its result; see `netra.tool.ToolContext`."""
        ended = await self.ran(code=code, argv=argv, arguments=arguments, files=files)
        return orjson.loads(ended.result)

    async def ran(
        self, *, code: str = "", argv: Sequence[str] = (), arguments: Mapping[str, Any] = _NOTHING,
        files: Mapping[str, bytes | Path] = _NOTHING, module: str = "",
    ) -> tiers.Ended:  # fmt: skip
        """The same, with what it printed. The secrets of the tool are in its environment, their names in capitals.

        `module` is one of the operator's that the code is about to import.
        """
        _check(self._spec, code, argv)
        sandbox = await self._frame.means.sandboxes.tier(self._spec.enforcement)
        environment = {name.upper(): self.secret(name) for name in self._spec.secrets}
        limits = self._frame.means.sandboxes.limits.of(self.context.tier, self.left_s)
        async with self.folder() as folder:
            if files:
                await asyncio.to_thread(_fill, folder, dict(files), limits)
            job = tiers.Job(
                folder, limits, code=code, argv=tuple(argv), arguments=given.written(dict(arguments), "arguments"), environment=environment,
                owner="" if self._frame.apart else self.context.user_id, module=module, begins=self._begins,
            )  # fmt: skip
            try:
                return await sandbox.run(job)
            except errors.NetraError as error:
                _scrub(error, environment)
                if isinstance(error, errors.SecurityViolation):
                    self._hears.violated(self._spec, error)
                raise

    @contextlib.asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """An empty folder for what one process of this call does; it is removed afterwards."""
        self._count += 1
        made = self._frame.files.of_call(f"{self._call.tool_call_id}-{self._count}")
        try:
            yield made
        finally:
            await workspace.removed(made)

    async def close(self) -> None:
        """Nothing is shown any more, and the folder of an isolated call is removed."""
        self._over = True
        if self._frame.apart:
            await workspace.removed(self.workspace)


def _check(spec: ToolSpec, code: str, argv: Sequence[str]) -> None:
    """Raises `ValueError` when the tool does not use its tier as it is meant to be used."""
    if spec.enforcement not in ("script", "python", "command"):
        raise ValueError(f"{spec.name} declares the tier {spec.enforcement}: there is no sandbox to run foreign code in")
    wants = "argv" if spec.enforcement == "command" else "code"
    if bool(argv) is not (wants == "argv") or bool(code) is bool(argv):
        raise ValueError(f"{spec.name}: the tier {spec.enforcement} takes {wants}, and that alone")


def _fill(folder: Path, files: Mapping[str, bytes | Path], limits: tiers.Limits) -> None:
    """Raises `InvalidPayload` for a name that leads elsewhere, `ResourceExhausted` for files that are too many or too large."""
    if len(files) > limits.files:
        raise errors.ResourceExhausted(f"At most {limits.files} files can be given.", limit="files")
    left = limits.disk
    for name, content in files.items():
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise errors.InvalidPayload("files must have names that lie in the folder of the call", field="files")
        left -= len(content) if isinstance(content, bytes) else content.stat().st_size
        if left < 0:
            raise errors.ResourceExhausted(f"The files that are given have more than {limits.disk} bytes.", limit="disk")
        to = folder / path
        to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if isinstance(content, bytes):
            to.write_bytes(content)
        else:
            shutil.copyfile(content, to)


def _scrub(error: errors.NetraError, environment: Mapping[str, str]) -> None:
    """What foreign code said at its end may repeat what it was given: that goes to events, and to agents."""
    for value in environment.values():
        if len(value) >= _MIN_SECRET:
            error.message = error.message.replace(value, _STARS)
            error.details = {name: text.replace(value, _STARS) for name, text in error.details.items()}
    error.args = (error.message,)
