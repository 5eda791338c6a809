"""A process that has started does not search again and again through what it will keep."""

from __future__ import annotations

import signal
import subprocess
import sys

_PROCESS = """
import contextlib, gc
from chassis import lifecycle, settings

@contextlib.asynccontextmanager
async def build(_settings):
    assert not gc.get_freeze_count()
    yield object()
    print(gc.get_freeze_count() > 10_000, gc.isenabled(), gc.get_threshold()[0] > 10_000)

lifecycle.run("test", settings.ProcessSettings, build)
"""


def test_what_is_there_at_the_start_is_not_searched_for_garbage() -> None:
    process = subprocess.Popen([sys.executable, "-c", _PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "started" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=30)
    assert (told, process.returncode) == ("True True True\n", 0)
