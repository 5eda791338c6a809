"""Netra: run AI agents for many users, and watch them live without a gap."""

from typing import TYPE_CHECKING, Any

from netra.errors import NetraError

if TYPE_CHECKING:
    from netra.client import connect

__all__ = ["NetraError", "connect"]


def __getattr__(name: str) -> Any:
    # the client's dependencies are an extra: whoever imports the stubs need not have them
    if name != "connect":
        raise AttributeError(f"module 'netra' has no attribute {name!r}")
    try:
        from netra import client
    except ModuleNotFoundError as error:
        if error.name not in ("httpx", "websockets"):
            raise
        raise ModuleNotFoundError("netra.connect needs the extra: pip install 'netra[cli]'", name=error.name) from None
    return client.connect
