"""What can go wrong on one machine, each with the sentence that says what to do about it."""


class StandaloneError(Exception):
    """Something on this machine is in the way; `remedy` says how to remove it."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  remedy: {self.remedy}" if self.remedy else message


class PortInUse(StandaloneError):
    """Another process listens on a port we need."""


class AlreadyRunning(StandaloneError):
    """Another launcher holds the lock of this folder."""


class StartFailed(StandaloneError):
    """A process did not become ready."""


class BackendUnavailable(StandaloneError):
    """The chosen backend cannot be used here; an explicit choice never falls back."""
