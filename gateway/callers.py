"""Who sends a request: the one credential it carries, and where it comes from."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from chassis import identity, log
from gateway import addresses, api_keys, entitlements, problems
from netra import errors

# what auth gives longer sessions to
_COMMAND_LINE = "netra cli"


def device(connection: HTTPConnection, said: str) -> str:
    """What the client calls itself, for the list of devices. A page is no command line, whatever it says."""
    headers = connection.headers
    is_page = "origin" in headers or any(name.startswith("sec-fetch-") for name in headers)
    return "browser" if is_page and said.startswith(_COMMAND_LINE) else said


class Callers:
    """Turns credentials of clients into users."""

    def __init__(
        self, verifier: identity.Verifier, keys: api_keys.ApiKeys, entitled: entitlements.Entitlements,
        trusted: tuple[addresses.Network, ...],
    ) -> None:  # fmt: skip
        self._verifier, self._keys, self._entitled, self._trusted = verifier, keys, entitled, trusted

    async def of(self, connection: HTTPConnection, credential: str = "") -> identity.Principal:
        """The user of a request or a handshake, which is counted. Raises `Unauthenticated`, `RateLimited`."""
        try:
            who = await self.known(credential or problems.bearer(connection.headers), self.address(connection))
        except errors.Unauthenticated:
            await self.nobody(connection)  # guessing is counted too
            raise
        log.bind(user_id=who.user_id)
        await self._entitled.count(who)
        return who

    async def nobody(self, connection: HTTPConnection) -> str:
        """The address of a request that needs no user, which is counted. Raises `RateLimited`."""
        address = self.address(connection)
        await self._entitled.count_anonymous(address)
        return address

    async def known(self, credential: str, address: str) -> identity.Principal:
        """The user of an access token or an API key. Raises `Unauthenticated`."""
        if not credential:
            raise errors.Unauthenticated("Send an access token as Authorization: Bearer <token>. POST /auth/login gives one.")
        try:
            if credential.startswith(api_keys.PREFIX):
                return await self._keys.principal(credential, address)
            return await self._verifier.principal(credential)
        except errors.Unauthenticated as error:
            self._entitled.refused("credential", error)
            raise

    def address(self, connection: HTTPConnection) -> str:
        """The network address of the client."""
        peer = connection.client.host if connection.client is not None else ""
        return addresses.client(peer, connection.headers.getlist("x-forwarded-for"), self._trusted)
