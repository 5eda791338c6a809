"""What the tier `script` must withstand before it is called available: a positive control, then attacks."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from netra import errors
from services.dispatcher.tools.sandbox import tiers

_CONTROL = ("print(text)\n[n for n in range(3)]", b'{"text":"hello"}', b"[0,1,2]", "hello\n")
# each returns when it got what it wanted, and raises otherwise
_ATTACKS = {
    "it found what a call before it left": "left_by_a_call",  # the first, for whom the host that served that call is there
    "it read a file": "open('/proc/self/status').read()",
    "it listed a folder": "import os\nos.listdir('/proc')",
    "it wrote a file": "open('/sandbox/netra-probe', 'w').write('x')",
    "it read the environment": "import os\nos.environ['PATH']",
    "it opened a socket": "import socket\nsocket.socket()",
    "it started a program": "import os\nos.system('true')",
    "it called C": "import ctypes\nctypes.CDLL(None)",
    "it reached all classes": "().__class__.__base__.__subclasses__()",
    "it got the builtins": "__builtins__['open']",
    "it took memory without a limit": "x = 'a' * 2 ** 30",
    "it took memory piece by piece": "x = []\nfor n in range(10 ** 8): x.append('a' * 100)",
    "it ran without an end": "while True: pass",
}
_LIMITS = tiers.Limits(wall_s=5.0, cpu_s=0.2, memory=32 * 1024 * 1024, output=4096)
_REMEDY = "This machine or this version of the interpreter does not hold a script. Report it, and leave the tier switched off."


async def probe(sandbox: tiers.Sandbox, backend: str) -> tiers.Availability:
    """Never raises."""
    code, arguments, result, output = _CONTROL
    with tempfile.TemporaryDirectory(prefix="netra-probe-") as name:
        folder = Path(name)
        try:
            ended = await sandbox.run(tiers.Job(folder, _LIMITS, code=code, arguments=arguments, owner="probe"))
            if (ended.result, ended.output) != (result, output):
                return tiers.Availability("script", backend, False, reason="a harmless script did not work", remedy=_REMEDY)
            await sandbox.run(tiers.Job(folder, _LIMITS, code="left_by_a_call = 1", owner="probe"))
            jobs = [tiers.Job(folder, _LIMITS, code=attack, owner="probe") for attack in _ATTACKS.values()]
            through = await asyncio.gather(*(_through(sandbox, job) for job in jobs))
        except errors.NetraError as error:
            remedy = error.details.get("remedy", _REMEDY)
            return tiers.Availability("script", backend, False, reason=f"a harmless script did not work: {error.message}", remedy=remedy)
    if escaped := [what for what, got in zip(_ATTACKS, through, strict=True) if got]:
        return tiers.Availability("script", backend, False, reason=f"a script got through: {', '.join(escaped)}", remedy=_REMEDY)
    return tiers.Availability("script", backend, True)


async def _through(sandbox: tiers.Sandbox, job: tiers.Job) -> bool:
    try:
        await sandbox.run(job)
    except (errors.ToolFailed, errors.ResourceExhausted):
        return False
    # a late one was not held either: the interpreter is to end it by its own limits
    except errors.DeadlineExceeded:
        return True
    return True
