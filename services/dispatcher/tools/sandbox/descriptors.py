"""Descriptors that come over a socket. The standard library only: it is loaded in the processes that calls are forked from."""

from __future__ import annotations

import array
import socket


def received(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """One message of at most `size` bytes, and at most `most` descriptors beside it. Raises what `recvmsg` does.

    No process that is started later inherits them. `socket.recv_fds` takes the flag for that and forgets it.
    """
    handles = array.array("i")
    text, beside, _flags, _address = sock.recvmsg(size, socket.CMSG_SPACE(most * handles.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            handles.frombytes(data[: len(data) - len(data) % handles.itemsize])
    return text, list(handles)
