"""A folder in which the spend tools' worker answers, in this process or in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from netra import errors
from services.dispatcher.tools.spend import worker

ROOT = Path(__file__).resolve().parents[4]
WORKER = "services.dispatcher.tools.spend.worker"


def load(folder: Path, content: bytes, name: str = "usage.log", **given: object) -> dict[str, Any]:
    """Load a log. Raises what the worker answers with."""
    (folder / "log").write_bytes(content)
    request = {"tool": "usage_load", "file": "log", "name": name, "model": "", "named": {}, "zone": "", **given}
    loaded: dict[str, Any] = asked(folder, request)
    return loaded


def asked(folder: Path, request: dict[str, Any]) -> Any:
    """The result of a request, as JSON gives it back."""
    return _result(json.loads(json.dumps(worker.answer(request, folder))))


def asked_apart(folder: Path, request: dict[str, Any]) -> Any:
    """The same from a process that is started for it."""
    command = [sys.executable, "-P", "-m", WORKER]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
    done = subprocess.run(command, input=json.dumps(request), cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return _result(json.loads(done.stdout))


def _result(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        error = errors.by_code(answer["error"]["code"])(answer["error"]["message"])
        error.details = answer["error"]["details"]
        raise error
    return answer["result"]
