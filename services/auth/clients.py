"""The service identities: who they are and the digests of their secrets."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

from chassis import log, settings

_log = log.get(__name__)
_NO_DIGEST = "0" * 64


class Clients:
    """Reads `services.json` again whenever it changes, so that secrets rotate without a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[str, str] = {}
        self._stamp: tuple[int, int] | None = None

    def load(self) -> None:
        """Read the file if it changed. Raises `MissingSecret` when it cannot be read, `ValueError` when it is malformed."""
        try:
            status = self._path.stat()
            if (stamp := (status.st_mtime_ns, status.st_size)) == self._stamp:
                return
            self._digests = _parsed(self._path.read_text(encoding="utf-8"), self._path)
        except OSError as error:
            raise settings.MissingSecret(f"the file {self._path} cannot be read ({error.strerror})") from None
        self._stamp = stamp

    def known(self, name: str, secret: str) -> bool:
        """Whether the secret is that of the service."""
        self._reload()
        presented = hashlib.sha256(secret.encode()).hexdigest()
        matched = hmac.compare_digest(presented, self._digests.get(name, _NO_DIGEST))
        return matched and name in self._digests

    def _reload(self) -> None:
        try:
            self.load()
        except (settings.MissingSecret, ValueError) as error:
            _log.error("going on with the service identities known before", reason=str(error))


def _parsed(text: str, path: Path) -> dict[str, str]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(digest, str) and len(digest) == 64 for digest in found.values()):
        raise ValueError(f"{path} must be a JSON object of service names and SHA-256 digests in hex")
    return {name: digest.lower() for name, digest in found.items()}
