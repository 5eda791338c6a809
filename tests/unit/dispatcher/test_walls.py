"""The lists of calls of the kernel that the walls are made of."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable

import pyseccomp  # type: ignore[import-untyped]
import pytest

from services.dispatcher.tools.sandbox import descriptors, filters, seccomp, walls

_LISTS = {
    "allowed": walls.ALLOWED,
    "refused": walls.REFUSED,
    "deadly": walls.DEADLY,
    "refused once the code begins": walls.UNTIL_THEN_REFUSED,
    "deadly once the code begins": walls.UNTIL_THEN_DEADLY,
    "of files by owner": walls.OF_FILES_BY_OWNER,
    "extended attributes": walls.EXTENDED,
}


@pytest.mark.parametrize("names", _LISTS.values(), ids=list(_LISTS))
def test_every_name_is_one_of_a_call(names: list[str]) -> None:
    unknown = [name for name in names if int(pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name)) == -1]
    # what the installed library is too old for does not exist (ENOSYS) for code either
    assert set(unknown) <= {"fchmodat2", "futex_waitv"}


def test_no_call_is_in_two_lists() -> None:
    for (one, ones), (other, others) in itertools.combinations(_LISTS.items(), 2):
        assert not set(ones) & set(others), (one, other)


@pytest.mark.parametrize(
    "name", ["execve", "fork", "vfork", "socket", "kill", "ptrace", "mount", "bpf", "unshare", "symlink", "memfd_create"]
)
def test_what_must_not_be_is_not_allowed(name: str) -> None:
    assert name not in walls.ALLOWED


def test_without_the_library_that_is_said_when_a_wall_is_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "pyseccomp", None)
    makes: list[Callable[[], bytes]] = [
        lambda: filters.compiled(sockets=True), lambda: walls.zygote_filter(owner_of_others=True), walls.last_filter,
    ]  # fmt: skip
    for make in makes:
        with pytest.raises(OSError, match="libseccomp is not installed"):
            make()


def test_a_descriptor_that_comes_over_a_socket_is_not_passed_on() -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, theirs:
        socket.send_fds(mine, [b"a"], [0, 1])
        text, handles = descriptors.received(theirs, 16, 4)
        assert (text, len(handles)) == (b"a", 2)
        assert not any(map(os.get_inheritable, handles))
        for handle in handles:
            os.close(handle)
        mine.send(b"b")
        assert descriptors.received(theirs, 16, 4) == (b"b", [])
        mine.close()
        assert descriptors.received(theirs, 16, 4) == (b"", [])


def test_a_filter_is_small_where_it_is_loaded_for_each_call() -> None:
    assert len(walls.last_filter()) < len(walls.zygote_filter(owner_of_others=False)) / 5
