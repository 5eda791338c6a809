"""Mutual TLS between processes: certificates out of files, read again whenever the files change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtensionOID, NameOID

from chassis import environment, log
from chassis import settings as settings_

_log = log.get(__name__)
_LOOK_EVERY_S = 1.0
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Pems:
    """What the three files hold; a key that fits its certificate."""

    cert: bytes
    key: bytes
    ca: bytes
    names: frozenset[str]

    def for_server(self) -> Any:
        """What a server proves itself with."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], root_certificates=self.ca)

    def for_channel(self) -> grpc.ChannelCredentials:
        """What a client proves itself with."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


class Certificates:
    """The certificate of this process, its key, and the authority that vouches for the others."""

    def __init__(self, cert: Path, key: Path, ca: Path) -> None:
        """Raises `ValueError` naming the file that cannot be used, and why."""
        self._files = (cert, key, ca)
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self._stamp = self._stamped()
        self._current = self._read()

    def current(self) -> Pems:
        """What the files hold, looked at once a second at most; what they held before, while they do not fit together."""
        # handshakes ask from threads of gRPC
        with self._lock:
            if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
                self._looked_at = time.monotonic()
                self._look()
            return self._current

    def _look(self) -> None:
        try:
            stamp = self._stamped()
            if stamp == self._stamp:
                return
            self._current = self._read()
            self._stamp = stamp
            _log.info("the certificate was read again", names=sorted(self._current.names))
        except ValueError as error:
            # the files are replaced one after another: the next look sees all
            _log.warning("going on with the certificate known before", reason=str(error))

    def _stamped(self) -> _Stamp:
        try:
            found = [path.stat() for path in self._files]
        except OSError as error:
            raise ValueError(f"the file {error.filename} cannot be read ({error.strerror})") from None
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)

    def _read(self) -> Pems:
        cert, key, ca = (_content(path) for path in self._files)
        chain = _parsed(self._files[0], lambda: x509.load_pem_x509_certificates(cert))
        private = _parsed(self._files[1], lambda: serialization.load_pem_private_key(key, password=None))
        _parsed(self._files[2], lambda: x509.load_pem_x509_certificates(ca))
        if _spki(chain[0].public_key()) != _spki(private.public_key()):
            raise ValueError(f"the key in {self._files[1]} is not that of the certificate in {self._files[0]}")
        return Pems(cert, key, ca, _names(chain[0]))

    def server(self) -> grpc.ServerCredentials:
        """Credentials of a server that demands a certificate of its clients too."""
        shown = [self.current()]

        def changed() -> Any:
            now = self.current()
            if now is shown[0]:
                return None
            shown[0] = now
            return now.for_server()

        return grpc.dynamic_ssl_server_credentials(shown[0].for_server(), changed, require_client_authentication=True)


def of(settings: settings_.ProcessSettings) -> Certificates | None:
    """The certificates of a process, when it is given some. Raises `ValueError` for files that cannot be used."""
    if settings.tls_cert is None or settings.tls_key is None or settings.tls_ca is None:
        return None
    return Certificates(settings.tls_cert, settings.tls_key, settings.tls_ca)


def peer_names(auth_context: Mapping[str, Any]) -> frozenset[str]:
    """The names in the certificate that the other end has shown; its common name only where it has no others."""
    named = auth_context.get("x509_subject_alternative_name") or auth_context.get("x509_common_name") or ()
    return frozenset(name.decode("utf-8", "replace") for name in named)


def probe() -> tuple[grpc.ChannelCredentials, str]:
    """Credentials to ask a process of this environment how it is, and the name it has. Raises `ValueError` without certificates."""
    variables = environment.get_environment()
    cert, key, ca = (Path(variables.get(name) or "") for name in ("NETRA_TLS_CERT", "NETRA_TLS_KEY", "NETRA_TLS_CA"))
    pems = Certificates(cert, key, ca).current()
    return pems.for_channel(), min(pems.names, default="")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the file {path} cannot be read ({error.strerror})") from None


def _parsed(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ValueError, TypeError):
        raise ValueError(f"{path} does not hold what it must: a certificate, or a private key without a password, as PEM") from None


def _spki(key: Any) -> bytes:
    return bytes(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def _names(cert: x509.Certificate) -> frozenset[str]:
    try:
        found = cert.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
        if isinstance(found, x509.SubjectAlternativeName) and (names := found.get_values_for_type(x509.DNSName)):
            return frozenset(names)
    except x509.ExtensionNotFound:
        pass
    return frozenset(str(name.value) for name in cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
