"""Sign-ins that an outside provider vouches for: begun here, ended here, and by which rule somebody becomes which user."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from chassis import postgres
from netra import errors, ids
from services.auth import callers, oidc, providers, throttle, tokens, users

ATTEMPT_LIFE = timedelta(minutes=10)
CODE_LIFE = timedelta(seconds=60)
_MAX_TEXT = 4096
_TRIES = 3
_CHALLENGE = re.compile(r"[A-Za-z0-9_\-]{43}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A sign-in that is under way; nobody is known yet. Digests only of what the browser holds.

    `code_verifier` is ours towards the provider; `code_challenge` is the frontend's towards us, if it has one.
    """

    state_digest: bytes
    binding_digest: bytes
    provider: str
    nonce: str
    code_verifier: str
    redirect_uri: str
    callback_uri: str
    code_challenge: bytes | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the browser came back with."""

    state: str
    code: str
    issuer: str
    error: str
    binding: str
    origin: callers.Origin


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: tokens, or the frontend's page with a one-time code."""

    issued: tokens.Issued | None = None
    redirect_to: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """A one-time code: whose it is, how they signed in, and the digest of what whoever redeems it must have."""

    digest: bytes
    bound_to: bytes
    user_id: str
    method: str
    device: str


@dataclass(frozen=True, slots=True)
class Redeemed:
    """A code that was redeemed, and its user as they are now."""

    account: users.Account
    code: Code


class Kept(Protocol):
    """Where sign-ins under way, one-time codes and the people of providers are kept."""

    async def add_attempt(self, attempt: Attempt, life: timedelta) -> None:
        """Keep a sign-in that begins."""
        ...

    async def take_attempt(self, state_digest: bytes) -> Attempt | None:
        """A sign-in under way, which nobody can take again."""
        ...

    async def by_identity(self, provider: str, subject: str) -> users.Account | None:
        """The user that a person of a provider is."""
        ...

    async def by_email(self, email: str) -> users.Account | None:
        """The user who has this address."""
        ...

    async def link(self, person: users.Identity, user_id: str) -> None:
        """From now on the person is that user. Raises `Conflict` when they became one meanwhile."""
        ...

    async def add_code(self, code: Code, life: timedelta) -> None:
        """Keep a one-time code."""
        ...

    async def redeem_code(self, digest: bytes) -> Redeemed | None:
        """What a one-time code is good for: once, while it lives."""
        ...

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str) -> None:
        """Add a line about somebody who is not signed in."""
        ...


class Doors(Protocol):
    """Opens sessions."""

    @property
    def throttle(self) -> throttle.Throttle:
        """Counts who tries to get in."""
        ...

    async def open(self, user: users.User, method: str, origin: callers.Origin) -> tokens.Issued:
        """Tokens of a new session. Raises `Unauthenticated` when the user is disabled."""
        ...


class People(Protocol):
    """Where users are made."""

    async def create_user(
        self, user: users.User, email: str, password_hash: str | None, invitation: users.Invitation | None, actor: str,
        person: users.Identity | None = None,
    ) -> None:  # fmt: skip
        """Add a user, and who they are at an outside provider. Raises `Conflict` when the e-mail or the person is taken."""
        ...


class Outside:
    """The outside sign-ins of this installation."""

    def __init__(self, known: Mapping[str, providers.Provider], rows: Kept, doors: Doors, people: People) -> None:
        self._providers, self._rows, self._doors, self._people = known, rows, doors, people
        self._clients = oidc.clients(known)

    async def close(self) -> None:
        """Close the connections to the providers."""
        for client in self._clients.values():
            await client.close()

    async def start(self, name: str, redirect_uri: str, callback_uri: str, code_challenge: str) -> tuple[str, str]:
        """Where to send the browser, and what binds the sign-in to it. Raises `NotFound`, `InvalidPayload`, `Unavailable`."""
        if name not in self._clients:
            raise errors.NotFound(f"There is no identity provider {name[:64]!r}.", field="provider")
        if redirect_uri and redirect_uri not in self._providers[name].redirects:
            raise errors.InvalidPayload(
                "redirect_uri is not one of the pages that this provider's sign-in may end at", field="redirect_uri"
            )
        challenge = _challenge(code_challenge)
        state, binding = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        nonce, code_verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(48)
        url = await self._clients[name].authorization_url(callback_uri, state, nonce, code_verifier)
        attempt = Attempt(_digest(state), _digest(binding), name, nonce, code_verifier, redirect_uri, callback_uri, challenge)
        await self._rows.add_attempt(attempt, ATTEMPT_LIFE)
        return url, binding

    async def finish(self, answer: Answer) -> Finished:
        """End a sign-in; each can be ended once. Raises `Unauthenticated`, or `PermissionDenied` for a disabled or unknown person."""
        await self._doors.throttle.called("oidc", answer.origin)
        if any(len(text) > _MAX_TEXT for text in (answer.state, answer.code, answer.issuer, answer.error, answer.binding)):
            raise _refused("the answer is too long")
        attempt = await self._rows.take_attempt(_digest(answer.state))
        if attempt is None or attempt.provider not in self._clients:
            raise _refused("it was not begun here, took too long, or was ended before")
        try:
            account = await self._account(attempt, answer)
        except (errors.Unauthenticated, errors.PermissionDenied) as refusal:
            await self._doors.throttle.wrong(throttle.unguessable("oidc", answer.origin))
            await self._rows.audit(None, "login", "refused", f"oidc {attempt.provider}: {refusal.message}")
            raise
        method = f"oidc:{attempt.provider}"
        if not attempt.redirect_uri:
            return Finished(await self._doors.open(account.user, method, answer.origin))
        code = "nlc_" + secrets.token_urlsafe(32)
        bound_to = attempt.code_challenge or attempt.binding_digest
        await self._rows.add_code(Code(_digest(code), bound_to, account.user.user_id, method, answer.origin.device), CODE_LIFE)
        return Finished(redirect_to=_with_code(attempt.redirect_uri, code))

    async def redeem(self, code: str, proof: str, origin: callers.Origin) -> tokens.Issued:
        """The tokens for a one-time code, and the proof that it is in the right hands. Raises `Unauthenticated`, `RateLimited`."""
        await self._doors.throttle.called("login_code", origin)
        fits = max(len(code), len(proof)) <= _MAX_TEXT
        redeemed = await self._rows.redeem_code(_digest(code)) if fits else None
        if redeemed is None or redeemed.account.disabled or not hmac.compare_digest(_digest(proof), redeemed.code.bound_to):
            await self._doors.throttle.wrong(throttle.unguessable("login_code", origin))
            raise errors.Unauthenticated(
                "The code is not valid, was used before, is older than a minute, or belongs to another browser. Sign in again."
            )
        return await self._doors.open(redeemed.account.user, redeemed.code.method, callers.Origin(origin.address, redeemed.code.device))

    async def _account(self, attempt: Attempt, answer: Answer) -> users.Account:
        if not hmac.compare_digest(_digest(answer.binding), attempt.binding_digest):
            raise _refused("it was begun in another browser")
        client = self._clients[attempt.provider]
        await client.check_issuer(answer.issuer)
        if answer.error or not answer.code:
            raise _refused("the provider did not let you in")
        found = await client.person(answer.code, attempt.callback_uri, attempt.nonce, attempt.code_verifier)
        person = users.Identity(attempt.provider, found.subject, found.email)
        for _ in range(_TRIES):
            try:
                return await self._user(self._providers[attempt.provider], person)
            except postgres.Conflict:
                continue  # the same person was faster elsewhere, or somebody made a user with this address
        raise errors.Unavailable("The same person is signing in elsewhere just now. Try again.", retry_after_ms=100)

    async def _user(self, provider: providers.Provider, person: users.Identity) -> users.Account:
        """The known one; else, by the rules of the provider, the one with the same verified address, or a new one."""
        known = await self._rows.by_identity(person.provider, person.subject)
        if known is not None:
            return _let_in(provider, known)
        address = users.normal_email(person.email) if person.email else None
        account = await self._rows.by_email(address) if address is not None else None
        if account is None:
            return await self._made(provider, person, address)
        # who is an administrator can do more harm than the provider may be trusted with
        if not provider.link_verified_email or ("admin" in account.user.roles and not provider.link_admins):
            raise errors.PermissionDenied("There is a user with this e-mail address who does not sign in this way. Ask your administrator.")
        _let_in(provider, account)
        await self._rows.link(person, account.user.user_id)
        return account

    async def _made(self, provider: providers.Provider, person: users.Identity, address: str | None) -> users.Account:
        if not provider.create_users or address is None:
            why = "the provider has not verified your e-mail address" if provider.create_users else "you have no account here"
            raise errors.PermissionDenied(f"You cannot be let in: {why}. Ask your administrator.")
        tenant_id = str(provider.tenant_id) if provider.tenant_id is not None else ids.TenantId.new()
        made = users.User(ids.UserId.new(), tenant_id, provider.roles, provider.tier, 1)
        await self._people.create_user(made, address, None, None, "auth", person)
        return users.Account(made, None, False)


def _let_in(provider: providers.Provider, account: users.Account) -> users.Account:
    if account.disabled:
        raise errors.PermissionDenied("This account is disabled. Ask your administrator.")
    if provider.tenant_id is not None and account.user.tenant_id != str(provider.tenant_id):
        raise errors.PermissionDenied("This account belongs to others than this provider. Ask your administrator.")
    return account


def _challenge(text: str) -> bytes | None:
    """The digest that a frontend's challenge stands for (RFC 7636, S256)."""
    if not text:
        return None
    found = base64.urlsafe_b64decode(text + "=") if _CHALLENGE.fullmatch(text) else b""
    if base64.urlsafe_b64encode(found).rstrip(b"=") != text.encode():
        raise errors.InvalidPayload(
            "code_challenge must be the SHA-256 of the code verifier in base64url, 43 characters (S256)", field="code_challenge"
        )
    return found


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _with_code(redirect_uri: str, code: str) -> str:
    parts = urlsplit(redirect_uri)
    return urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("code", code)])))


def _refused(why: str) -> errors.Unauthenticated:
    return errors.Unauthenticated(f"The sign-in was refused: {why}. Begin again.")
