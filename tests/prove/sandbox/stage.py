"""What attacks aim at: files, another call's folder, servers and a process outside of the sandbox, made for the purpose."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_VICTIM = """
import ctypes, sys
text = ctypes.create_string_buffer(sys.stdin.buffer.readline().strip())
print(ctypes.addressof(text), flush=True)
sys.stdin.read()
"""
# one process that forks for each code: to start an interpreter takes far longer
_OUTSIDE = """
import json, os, signal, sys, traceback
asked = json.loads(sys.stdin.read())
for number, code in enumerate(asked["codes"]):
    # one after the other: some take away, for a moment, what others look for
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        said = os.open(f"said-{number}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.mkdir(f"folder-{number}")
        os.chdir(f"folder-{number}")
        try:
            exec(code, dict(asked["facts"], __name__="__main__"))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


class Stage:
    """Everything is open to everybody by its file modes: what keeps an attack off is the sandbox alone.

    `facts` are the variables of the attacks' code. `folders` is where folders of calls are made, each by `folder`.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.canary = f"canary-{secrets.token_hex(8)}"
        self.facts: dict[str, object] = {"canary": self.canary}

    def __enter__(self) -> Self:
        root = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="netra-stage-")))
        root.chmod(0o755)
        self.folders, outside = root / "folders", root / "outside"
        for folder in (self.folders, outside):
            folder.mkdir()
            folder.chmod(0o777)
        secret = outside / "secret.txt"
        secret.write_text(self.canary)
        secret.chmod(0o666)
        other = self.folder("other")
        (other / "theirs.txt").write_text(self.canary)
        (other / "theirs.txt").chmod(0o666)
        self.facts |= {
            "secret_file": str(secret), "outside_folder": str(outside), "other_folder": str(other), "mark": f"nt{secrets.token_hex(5)}",
            "outside_pid": os.getpid(),
        }  # fmt: skip
        self._servers(outside)
        self._victim()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._stack.close()

    def folder(self, name: str = "") -> Path:
        """A new folder for one call."""
        made = self.folders / (name or secrets.token_hex(8))
        made.mkdir()
        made.chmod(0o777)
        return made

    def outside(self, codes: Sequence[str], timeout_s: float = 60.0) -> list[str]:
        """What each code prints when nothing contains it, in a process and a folder of its own."""
        with tempfile.TemporaryDirectory(prefix="netra-outside-") as folder:
            asked = json.dumps({"codes": list(codes), "facts": self.facts})
            subprocess.run(
                [sys.executable, "-c", _OUTSIDE], input=asked, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=True
            )
            return [(Path(folder) / f"said-{number}").read_text() for number in range(len(codes))]

    def survivors(self) -> list[int]:
        """The processes that bear the stage's mark as their name or in their command line."""
        mark, found = str(self.facts["mark"]).encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "comm").read_bytes() or mark in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def untouched(self) -> bool:
        """Whether what lies outside is as it was made, and the process outside lives."""
        kept = (Path(str(self.facts["secret_file"])), Path(str(self.facts["other_folder"])) / "theirs.txt")
        names = {path.name for path in Path(str(self.facts["outside_folder"])).iterdir()}
        as_made = all(path.read_text() == self.canary for path in kept) and names == {"secret.txt", "socket"}
        return as_made and self._process.poll() is None

    def _servers(self, folder: Path) -> None:
        tcp, udp = (self._stack.enter_context(socket.socket(type=kind)) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM))
        path, abstract = (self._stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        for server in (tcp, udp):
            server.bind(("127.0.0.1", 0))
        self.facts |= {"tcp_port": tcp.getsockname()[1], "udp_port": udp.getsockname()[1]}
        self.facts |= {"socket_path": str(folder / "socket"), "socket_name": f"netra-{secrets.token_hex(6)}"}
        path.bind(str(self.facts["socket_path"]))
        (folder / "socket").chmod(0o777)
        abstract.bind(f"\0{self.facts['socket_name']}")
        for server in (tcp, path, abstract):
            server.listen(64)

    def _victim(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", _VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stack.callback(self._end)
        asked, said = self._process.stdin, self._process.stdout
        assert asked is not None
        assert said is not None
        asked.write(self.canary.encode() + b"\n")
        asked.flush()
        self.facts |= {"victim_pid": self._process.pid, "victim_address": int(said.readline())}

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
