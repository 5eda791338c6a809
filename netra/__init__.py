"""Netra: run AI agents for many users, and watch them live without a gap."""

from netra.errors import NetraError

__all__ = ["NetraError"]
