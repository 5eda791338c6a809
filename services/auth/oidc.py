"""Login with an outside identity provider: authorization code with PKCE; the only importer of authlib."""

from __future__ import annotations

import asyncio
import hmac
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
import pydantic
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.httpx_client import AsyncOAuth2Client

from chassis import log
from netra import errors
from services.auth import providers

_log = log.get(__name__)
# signatures by a key that only the provider has; nothing symmetric, and never none
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_LEEWAY_S = 30
_TIMEOUT_S = 10.0
_METADATA_KEPT_S = 3600.0
# keys are asked for again when one is unknown, but not by everybody who invents one
_KEYS_PAUSE_S = 30.0
_MAX_BYTES = 256 * 1024
_METHODS = ("client_secret_basic", "client_secret_post")


@dataclass(frozen=True, slots=True)
class Person:
    """Whom a provider vouches for. `email` is lower case, and empty unless the provider has verified it."""

    subject: str
    email: str


class _Metadata(pydantic.BaseModel):
    """What a provider publishes about itself (OpenID Connect Discovery 1.0, section 3)."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    token_endpoint_auth_methods_supported: list[str] = ["client_secret_basic"]
    authorization_response_iss_parameter_supported: bool = False


class Client:
    """This installation as a client of one provider, whose certificate one of the `authorities` has signed."""

    def __init__(self, provider: providers.Provider, authorities: ssl.SSLContext) -> None:
        self._provider = provider
        self._authorities = authorities
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, verify=authorities)
        self._metadata: _Metadata | None = None
        self._read_at = self._keys_at = 0.0
        self._keys: dict[str, jwt.PyJWK] = {}
        self._reading = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def authorization_url(self, callback_uri: str, state: str, nonce: str, code_verifier: str) -> str:
        """Where to send the browser. Raises `Unavailable` when the provider cannot be asked."""
        metadata = await self._known()
        async with self._oauth(metadata, callback_uri) as oauth:
            url, _ = oauth.create_authorization_url(metadata.authorization_endpoint, state=state, nonce=nonce, code_verifier=code_verifier)
        return str(url)

    async def check_issuer(self, issuer: str) -> None:
        """Refuse an answer that another provider gave (RFC 9207). Raises `Unauthenticated`."""
        required = (await self._known()).authorization_response_iss_parameter_supported
        if (issuer or required) and not hmac.compare_digest(issuer.encode(), self._provider.issuer.encode()):
            raise _refused("the answer came from another provider")

    async def person(self, code: str, callback_uri: str, nonce: str, code_verifier: str) -> Person:
        """Who signed in. Raises `Unauthenticated` when the provider does not take the code, or its ID token is not right."""
        metadata = await self._known()
        try:
            async with self._oauth(metadata, callback_uri) as oauth:
                answer = await oauth.fetch_token(
                    metadata.token_endpoint, grant_type="authorization_code", code=code, code_verifier=code_verifier
                )
        except AuthlibBaseError as error:
            _log.warning("an identity provider refused a code", provider=self._provider.issuer, reason=error.error)
            raise _refused("the provider does not accept the code") from None
        except (httpx.HTTPError, ValueError) as error:
            raise _away(self._provider, error) from None
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise _refused("the provider sent no ID token")
        return _person(await self._claims(token, nonce))

    def _oauth(self, metadata: _Metadata, callback_uri: str) -> AsyncOAuth2Client:
        offered = metadata.token_endpoint_auth_methods_supported
        method = next((known for known in _METHODS if known in offered), _METHODS[0])
        return AsyncOAuth2Client(
            self._provider.client_id, self._provider.client_secret.get_secret_value(), token_endpoint_auth_method=method,
            scope=self._provider.scope, redirect_uri=callback_uri, code_challenge_method="S256", timeout=_TIMEOUT_S,
            follow_redirects=False, verify=self._authorities,
        )  # fmt: skip

    async def _claims(self, token: str, nonce: str) -> Mapping[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            key = await self._key(str(header.get("kid", "")))
            if header.get("alg") not in _ALGORITHMS or key is None:
                raise _refused("its ID token is signed by an unknown key")
            claims: Mapping[str, Any] = jwt.decode(
                token, key.key, algorithms=[str(header["alg"])], audience=self._provider.client_id, issuer=self._provider.issuer,
                leeway=_LEEWAY_S, options={"require": ["iss", "aud", "sub", "iat", "exp", "nonce"]},
            )  # fmt: skip
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise _refused("its ID token is not valid") from None
        if not isinstance(claims["nonce"], str) or not hmac.compare_digest(claims["nonce"].encode(), nonce.encode()):
            raise _refused("its ID token belongs to another sign-in")
        audience = claims["aud"]
        if isinstance(audience, list) and len(audience) > 1 and claims.get("azp") != self._provider.client_id:
            raise _refused("its ID token was made for somebody else")
        return claims

    async def _key(self, kid: str) -> jwt.PyJWK | None:
        if kid not in self._keys and time.monotonic() - self._keys_at > _KEYS_PAUSE_S:
            async with self._reading:
                if time.monotonic() - self._keys_at > _KEYS_PAUSE_S:
                    await self._read_keys()
        if not kid and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    async def _read_keys(self) -> None:
        found = await self._object((await self._known()).jwks_uri)
        keys = found.get("keys")
        usable = [key for key in keys if isinstance(key, dict) and key.get("use", "sig") == "sig"] if isinstance(keys, list) else []
        self._keys = {}
        for key in usable:
            try:
                self._keys[str(key.get("kid", ""))] = jwt.PyJWK(key)
            except (jwt.PyJWTError, ValueError, TypeError):
                continue  # a kind of key that we do not use
        self._keys_at = time.monotonic()

    async def _known(self) -> _Metadata:
        if self._metadata is None or time.monotonic() - self._read_at > _METADATA_KEPT_S:
            found = await self._object(self._provider.issuer.rstrip("/") + "/.well-known/openid-configuration")
            try:
                metadata = _Metadata.model_validate(found)
            except pydantic.ValidationError as error:
                raise _away(self._provider, error) from None
            self._check(metadata)
            self._metadata, self._read_at = metadata, time.monotonic()
        return self._metadata

    def _check(self, metadata: _Metadata) -> None:
        addresses = (metadata.authorization_endpoint, metadata.token_endpoint, metadata.jwks_uri)
        if metadata.issuer != self._provider.issuer or not all(map(providers.secure, addresses)):
            _log.error("an identity provider describes itself as somebody else, or has addresses without TLS", issuer=self._provider.issuer)
            raise errors.Unavailable("The identity provider cannot be used just now. Tell your administrator.")

    async def _object(self, url: str) -> dict[str, Any]:
        try:
            response = await self._http.get(url, headers={"Accept": "application/json"})
            found = response.raise_for_status().json() if len(response.content) <= _MAX_BYTES else None
        except (httpx.HTTPError, ValueError) as error:
            raise _away(self._provider, error) from None
        if not isinstance(found, dict):
            raise _away(self._provider, ValueError("not an object"))
        return found


def clients(known: Mapping[str, providers.Provider]) -> Mapping[str, Client]:
    """A client of each provider. Whose signature on a certificate is believed is read once, which holds everything up for tens of ms."""
    if not known:
        return {}
    authorities = httpx.create_ssl_context()
    return {name: Client(provider, authorities) for name, provider in known.items()}


def _person(claims: Mapping[str, Any]) -> Person:
    subject, email = claims["sub"], claims.get("email")
    if not isinstance(subject, str) or not 1 <= len(subject) <= 255:
        raise _refused("its ID token names nobody")
    # a letter of another script may have one of ours as its lower case: that is another address, and none that we know
    verified = claims.get("email_verified") is True and isinstance(email, str) and email.isascii()
    return Person(subject, str(email).strip().lower() if verified else "")


def _refused(why: str) -> errors.Unauthenticated:
    return errors.Unauthenticated(f"The sign-in was refused: {why}. Begin again.")


def _away(provider: providers.Provider, error: Exception) -> errors.Unavailable:
    _log.warning("an identity provider does not answer as it should", issuer=provider.issuer, error=type(error).__name__)
    return errors.Unavailable("The identity provider cannot be reached just now. Try again.")
