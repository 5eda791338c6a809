"""Folders of runs: made when asked for, private, removed with the run and with the process."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from netra import ids
from netra.tool import Artifact
from services.dispatcher.tools import workspace
from tests.fixtures import workspaces

# a dispatcher that dies with a run's folder in use; one that hangs is killed with the test
OTHER = """
import pathlib, sys, time
from netra import ids
from services.dispatcher.tools import workspace
from tests.fixtures import workspaces
spaces = workspace.Workspaces(pathlib.Path(sys.argv[1]), None, 1)
folder = spaces.of(ids.RunId.new(), workspaces.no_token).folder
(folder / "left").write_text("x")
print(folder, flush=True)
sys.stdin.read()
"""


class Shelf:
    """Artifacts that remember what they were asked."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str]] = []

    async def fetch(self, token: str, artifact_id: str, to: Path) -> Artifact:
        """Nothing is there."""
        raise AssertionError

    async def keep(self, token: str, request_id: str, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Remember."""
        self.kept.append((token, request_id))
        return Artifact(ids.uuid7(), name, media_type, len(bytes(str(content), "utf-8")), hashlib.sha256().hexdigest())


def spaces(root: Path, shelf: Shelf | None = None) -> workspace.Workspaces:
    """The workspaces of this process."""
    return workspace.Workspaces(root, shelf or Shelf(), 1)


def files(root: Path) -> list[str]:
    """What there is below a folder, without locks."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.name != ".lock" and path.is_file())


async def test_a_folder_is_made_when_asked_for_and_goes_with_its_run(tmp_path: Path) -> None:
    mine = spaces(tmp_path / "work")
    one, other = mine.of(ids.RunId.new(), workspaces.no_token), mine.of(ids.RunId.new(), workspaces.no_token)
    await other.remove()
    (one.folder / "log.csv").write_text("x")
    (other.folder / "log.csv").write_text("y")
    assert one.folder != other.folder
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "work", one.folder.parent, one.folder)] == [0o700] * 3
    await one.remove()
    assert [name.rpartition("/")[2] for name in files(tmp_path)] == ["log.csv"]
    mine.close()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]


def test_what_dead_processes_left_is_removed_and_what_living_ones_use_stays(tmp_path: Path) -> None:
    alive = spaces(tmp_path)
    (alive.of(ids.RunId.new(), workspaces.no_token).folder / "used").write_text("x")
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        spaces(tmp_path).close()
        assert left.exists()
        other.kill()
    spaces(tmp_path).close()
    assert [name.rpartition("/")[2] for name in files(tmp_path)] == ["used"]
    alive.close()


def test_who_starts_and_who_ends_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def come_and_go(_: int) -> None:
        for _ in range(100):
            spaces(tmp_path).close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come_and_go, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert "could not be removed" not in capsys.readouterr().out


def test_one_whose_root_is_gone_ends_all_the_same(tmp_path: Path) -> None:
    mine = spaces(tmp_path / "work")
    shutil.rmtree(tmp_path / "work")
    mine.close()


def test_a_root_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match="NETRA_WORK_DIR"):
        spaces(tmp_path)


def test_a_root_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    os.symlink(tmp_path / "real", tmp_path / "link")
    with pytest.raises(PermissionError, match="NETRA_WORK_DIR"):
        spaces(tmp_path / "link")


async def test_what_is_kept_has_one_request_id_per_call_and_name_and_the_token_of_the_moment(tmp_path: Path) -> None:
    shelf, run_id, token = Shelf(), ids.RunId.new(), ["old"]
    mine = spaces(tmp_path / "work", shelf)

    async def as_it_is() -> str:
        return token[0]

    for _ in range(2):
        run = mine.of(run_id, as_it_is)
        for origin, name in (("call-1", "a"), ("call-1", "b"), ("call-2", "a")):
            await run.keep(origin, name, "text/csv", b"x")
        token[0] = "new"
    await mine.of(ids.RunId.new(), workspaces.no_token).keep("call-1", "a", "text/csv", b"x")
    mine.close()
    ours = [request_id for _, request_id in shelf.kept]
    assert [seen for seen, _ in shelf.kept] == ["old"] * 3 + ["new"] * 3 + [""]
    assert ours[:3] == ours[3:6]
    assert len(set(ours)) == 4
    assert all(ids.RequestId(request_id) for request_id in ours)
