"""Private keys at rest: encrypted under a secret of the operator's."""

from __future__ import annotations

import re
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from chassis.settings import ProcessSettings

MIN_SECRET_BYTES = 32
_MIN_DISTINCT = 8
_NONCE_BYTES = 12
_PLACEHOLDER = re.compile(
    r"change(me|this|it)|replace(me|this)|(your|my|super|dev|development|test|default|jwt)secret|secretkey"
    r"|your(256|384|512)bit|yourkey|placeholder|insecure|notasecret|donotuse|example"
)


class KeysUnreadable(ValueError):
    """Stored keys were wrapped with another secret than the present one."""


class WrappingSettings(ProcessSettings):
    """Settings of a process that keeps private keys."""

    model_config = SettingsConfigDict(hide_input_in_errors=True)

    jwt_secret_key: SecretStr | None = Field(
        None, validation_alias="JWT_SECRET_KEY", description="What private keys are wrapped with; unset, it is the secret file `signing`."
    )

    @field_validator("jwt_secret_key")
    @classmethod
    def _strong(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_secret("JWT_SECRET_KEY", value.get_secret_value())
        return value

    def wrap(self, table: str) -> Wrap:
        """What wraps the private keys of a table. Raises `MissingSecret`, or `ValueError` for a weak secret file."""
        return Wrap(self._wrapping_secret(), table)

    def derived_key(self, purpose: str) -> bytes:
        """32 bytes for one purpose, the same at every start. Raises as `wrap` does."""
        return _derived(self._wrapping_secret(), purpose)

    def _wrapping_secret(self) -> str:
        if self.jwt_secret_key is not None:
            return self.jwt_secret_key.get_secret_value()
        secret = self.secret("signing").get_secret_value()
        check_secret(f"the secret file {self.secrets_dir / 'signing'}", secret)
        return secret


def check_secret(name: str, secret: str) -> None:
    """Raise `ValueError` when the secret is too short, or one that everybody knows."""
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise ValueError(f"{name} is shorter than {MIN_SECRET_BYTES} bytes. Set a random one, for example from `openssl rand -base64 48`.")
    letters = re.sub(r"[^a-z0-9]", "", secret.lower())
    if _PLACEHOLDER.search(letters) or len(set(secret)) < _MIN_DISTINCT:
        raise ValueError(f"{name} is a known placeholder. Set a random one, for example from `openssl rand -base64 48`.")


def _derived(secret: str, purpose: str) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=f"netra {purpose}".encode()).derive(secret.encode())


class Wrap:
    """Encrypts the private keys of one table (AES-256-GCM, key derived with HKDF-SHA256, bound to the key id)."""

    def __init__(self, secret: str, table: str) -> None:
        self._table = table
        self._cipher = AESGCM(_derived(secret, table))

    def seal(self, kid: str, private_key: Ed25519PrivateKey) -> bytes:
        """The private key, encrypted."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, private_key.private_bytes_raw(), kid.encode())

    def open(self, kid: str, sealed: bytes) -> Ed25519PrivateKey:
        """The private key again. Raises `KeysUnreadable` with what to do."""
        try:
            raw = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], kid.encode())
        except (InvalidTag, ValueError):
            raise KeysUnreadable(
                f"the key {kid} in {self._table} cannot be unwrapped: JWT_SECRET_KEY, or the secret file `signing` where that is not"
                f" set, is not the secret it was wrapped with. Put the old secret back, or delete the rows of {self._table} to start"
                " with new keys, which ends the validity of all tokens they signed."
            ) from None
        return Ed25519PrivateKey.from_private_bytes(raw)
