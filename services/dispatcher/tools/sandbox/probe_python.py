"""Attacks on the tier `python` at the start of the process: what a machine claims to forbid is tried. The long list is in the tests."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson

from netra import errors
from services.dispatcher.tools.sandbox.tiers import Ended, Job, Limits

Run = Callable[[Job], Awaitable[Ended]]

_LIMITS = Limits(wall_s=20.0, cpu_s=5.0, memory=128 << 20, processes=8, output=1 << 16)

# what must work: Python, its library, a thread, and the call's own folder; the answer is the argument, as it came back
_CONTROL = """
import os, threading, plistlib
with open("given.txt") as file:
    given = file.read()
with open("made.txt", "w") as file:
    file.write(given)
said = []
thread = threading.Thread(target=said.append, args=(open(os.__file__).readline(),))
thread.start()
thread.join()
result = open("made.txt").read() if said and os.listdir() else ""
"""

# each leaves a true `result` when it got through
_ATTACKS = {
    "reads the file of another call": "result = open(other + '/secret.txt').read()",
    "writes to the folder of another call": "open(other + '/planted.txt', 'w').write('x')\nresult = 1",
    "reads the accounts of the machine": "result = open('/etc/passwd').read()",
    "reads what the dispatcher was given": "result = open('/proc/%d/environ' % owner, 'rb').read().hex() or 'empty'",
    "lists processes": "import os\nresult = os.listdir('/proc')",
    "leaves a symbolic link": "import os\nos.symlink('/etc/passwd', 'link')\nresult = 1",
    "opens a socket": "import socket\nsocket.socket()\nresult = 1",
    "starts a process": "import os\nif os.fork() == 0:\n    os._exit(0)\nresult = 1",
    "becomes another program": "import os, sys\nos.execv(sys.executable, ['python'])\nresult = 1",
    "signals its parent": "import os\nos.kill(os.getppid(), 0)\nresult = 1",
    "signals the dispatcher": "import os\nos.kill(owner, 0)\nresult = 1",
    "makes a namespace": "import ctypes\nresult = ctypes.CDLL(None).unshare(0x10000000) == 0",
    "takes more memory": "result = len(bytearray(192 << 20))",
    "takes more descriptors": "import os\nresult = [os.dup(1) for _ in range(100)]",
    "has descriptors of others": (
        "import os\nresult = []\nfor fd in range(5, 256):\n    try:\n"
        "        os.fstat(fd)\n        result.append(fd)\n    except OSError:\n        pass"
    ),
    "starts more threads": (
        "import threading, time\nfor _ in range(64):\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "time.sleep(1)\nresult = 1"
    ),
}


async def attacked(run: Run, place: Path) -> str:
    """Attack the tier from calls whose folders are made in an empty place. Returns what is wrong with it, "" when nothing is."""
    token, other = secrets.token_hex(16), place / "other"
    other.mkdir()
    (other / "secret.txt").write_text(token)
    (other / "secret.txt").chmod(0o644)
    facts = orjson.dumps({"other": str(other), "owner": os.getpid()})
    given = _folder(place)
    (given / "given.txt").write_text(token)
    try:
        ended = await run(Job(given, _LIMITS, code=_CONTROL))
    except errors.NetraError as error:
        return f"what is allowed does not work: {error.message}"
    if orjson.loads(ended.result) != token or (given / "made.txt").read_text() != token:
        return "what is allowed does not work: a file did not come back"
    escaped = await asyncio.gather(*(_escaped(run, Job(_folder(place), _LIMITS, code=code, arguments=facts)) for code in _ATTACKS.values()))
    names = [name for name, out in zip(_ATTACKS, escaped, strict=True) if out]
    return f"code {', '.join(names)}" if names else ""


async def _escaped(run: Run, job: Job) -> bool:
    try:
        ended = await run(job)
    except (errors.ToolFailed, errors.ResourceExhausted, errors.SecurityViolation):
        return False
    except errors.NetraError:
        # it was not contained, but not even run: nothing is known
        return True
    return bool(orjson.loads(ended.result))


def _folder(place: Path) -> Path:
    folder = place / secrets.token_hex(8)
    folder.mkdir(mode=0o700)
    return folder
