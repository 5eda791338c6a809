"""Signing in and out over HTTP: JSON, OAuth 2 forms, outside providers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from starlette.requests import Request
from starlette.responses import Response

from chassis import channel, status
from gateway import callers, frames, problems, session, upstreams, views
from netra import errors
from netra.auth.v1 import auth_pb2

Endpoint = Callable[[Request], Awaitable[Response]]
_MAX_BYTES = 16 * 1024
_MAX_FIELDS = 20
_COOKIE = "netra_oidc"
_COOKIE_S = 600
# the callback reads it, and whoever exchanges the code
_COOKIE_PATH = "/auth"
_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - the name of a kind
_CLIENT = frozenset({"client_id", "client_secret"})
_GRANTS = {
    "client_credentials": frozenset[str](),
    "refresh_token": frozenset({"refresh_token"}),
    "authorization_code": frozenset({"code", "code_verifier"}),
    _EXCHANGE: frozenset({"subject_token", "subject_token_type", "requested_token_type"}),
}
_OAUTH_ERROR = {"RATE_LIMITED": "temporarily_unavailable", "UNAVAILABLE": "temporarily_unavailable", "INTERNAL": "server_error"}


class SignIn:
    """Every way to a token, and the way out."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge, self._services = edge, services

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [
            ("POST", "/auth/login", self.login),
            ("POST", "/auth/refresh", self.refresh),
            ("POST", "/auth/logout", self.logout),
            ("POST", "/auth/token", self.token),
            ("GET", "/auth/oidc/start", self.oidc_start),
            ("GET", "/auth/oidc/callback", self.oidc_callback),
        ]

    async def login(self, request: Request) -> Response:
        """Exchange a password for tokens."""
        address = await self._edge.callers.nobody(request)
        body = await problems.body_of(request, _MAX_BYTES)
        grant = auth_pb2.PasswordGrant(email=problems.required(body, "email", 254), password=problems.required(body, "password", 1024))
        return problems.answer(views.tokens(await self._issued(request, address, password=grant)))

    async def refresh(self, request: Request) -> Response:
        """Exchange a refresh token for a new pair."""
        address = await self._edge.callers.nobody(request)
        body = await problems.body_of(request, _MAX_BYTES)
        return problems.answer(views.tokens(await self._refreshed(address, problems.required(body, "refresh_token"))))

    async def logout(self, request: Request) -> Response:
        """End the session everywhere."""
        who = await self._edge.callers.of(request)
        with status.translated():
            answer = await self._services.auth.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=channel.bearer(who.token))
        return problems.answer({"session_id": answer.session_id})

    async def token(self, request: Request) -> Response:
        """The token endpoint of OAuth 2 (RFC 6749, RFC 8693): a form."""
        kind = ""
        try:
            # who sends too many is told before their body is waited for
            address = await self._edge.callers.nobody(request)
            form = await _form(request)
            kind = form.get("grant_type", "")
            found = await self._granted(request, address, form)
        except errors.NetraError as error:
            return _oauth_refusal(error, kind)
        answer = problems.answer(views.oauth_tokens(found, _ACCESS_TOKEN if kind == _EXCHANGE else ""))
        if kind == "authorization_code":
            answer.delete_cookie(_COOKIE, path=_COOKIE_PATH)
        return answer

    async def _granted(self, request: Request, address: str, form: dict[str, str]) -> auth_pb2.Tokens:
        kind = form.get("grant_type", "")
        if kind not in _GRANTS:
            raise errors.InvalidPayload(f"grant_type must be one of {', '.join(_GRANTS)}", field="grant_type")
        if kind == "refresh_token":
            return await self._refreshed(address, _wanted(form, "refresh_token"))
        if kind == "authorization_code":
            proof = {"code_verifier": form.get("code_verifier", ""), "binding": request.cookies.get(_COOKIE, "")}
            return await self._issued(request, address, login_code=auth_pb2.LoginCodeGrant(code=_wanted(form, "code"), **proof))
        client = _client(request, form)
        if kind == "client_credentials":
            return await self._issued(request, address, client_credentials=client)
        for name in ("subject_token_type", "requested_token_type"):
            if form.get(name, _ACCESS_TOKEN) != _ACCESS_TOKEN:
                raise errors.InvalidPayload(f"{name} must be {_ACCESS_TOKEN}", field=name)
        grant = auth_pb2.ExchangeGrant(
            subject_token=_wanted(form, "subject_token"), actor=client, scope=_wanted(form, "scope").split(" ")
        )  # fmt: skip
        return await self._issued(request, address, exchange=grant)

    async def _issued(self, request: Request, address: str, **grant: Any) -> auth_pb2.Tokens:
        device = callers.device(request, request.headers.get("user-agent", "")[:200])
        wanted = auth_pb2.IssueTokenRequest(device=device, client_address=address, **grant)
        with status.translated():
            return (await self._services.auth.IssueToken(wanted, metadata=await self._services.credentials())).tokens

    async def _refreshed(self, address: str, refresh_token: str) -> auth_pb2.Tokens:
        wanted = auth_pb2.RefreshTokenRequest(refresh_token=refresh_token, client_address=address)
        with status.translated():
            return (await self._services.auth.RefreshToken(wanted, metadata=await self._services.credentials())).tokens

    async def oidc_start(self, request: Request) -> Response:
        """Send the browser to an outside provider."""
        await self._edge.callers.nobody(request)
        query = _query(request, ("provider", "redirect_uri", "code_challenge", "code_challenge_method"))
        if query.get("code_challenge_method", "S256") != "S256":
            raise frames.wrong("query.code_challenge_method", "must be S256")
        base = self._edge.settings.base_url(request.headers.get("host", ""))
        wanted = auth_pb2.StartOidcRequest(
            provider=problems.required(query, "provider", 64),
            redirect_uri=query.get("redirect_uri", ""),
            callback_uri=f"{base}/auth/oidc/callback",
            code_challenge=query.get("code_challenge", ""),
        )
        with status.translated():
            found = await self._services.auth.StartOidc(wanted, metadata=await self._services.credentials())
        answer = _elsewhere(found.authorization_url)
        answer.set_cookie(
            _COOKIE, found.binding, _COOKIE_S, path=_COOKIE_PATH, secure=base.startswith("https:"), httponly=True, samesite="lax"
        )
        return answer

    async def oidc_callback(self, request: Request) -> Response:
        """Where the provider sends the browser back to."""
        address = await self._edge.callers.nobody(request)
        query = _query(request, ("state", "code", "iss", "error"))
        wanted = auth_pb2.FinishOidcRequest(
            state=problems.required(query, "state", 512),
            code=query.get("code", ""),
            issuer=query.get("iss", ""),
            error=query.get("error", "")[:200],
            binding=request.cookies.get(_COOKIE, ""),
            device=callers.device(request, request.headers.get("user-agent", "")[:200]),
            client_address=address,
        )
        with status.translated():
            found = await self._services.auth.FinishOidc(wanted, metadata=await self._services.credentials())
        if found.redirect_to:
            return _elsewhere(found.redirect_to)
        answer = problems.answer(views.tokens(found.tokens))
        answer.delete_cookie(_COOKIE, path=_COOKIE_PATH)
        return answer


def _elsewhere(address: str) -> Response:
    # what is in the address is for one page and for no log of another
    return Response(status_code=303, headers={"Location": address, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})


def _query(request: Request, names: tuple[str, ...]) -> dict[str, str]:
    found = request.query_params.multi_items()
    for name in names:
        if sum(given == name for given, _ in found) > 1:
            raise frames.wrong(f"query.{name}", "is there more than once")
    return {name: value for name, value in found if name in names and "\x00" not in value}


async def _form(request: Request) -> dict[str, str]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise errors.InvalidPayload("Send the body as application/x-www-form-urlencoded.", field="Content-Type")
    raw = await problems.raw_body(request, _MAX_BYTES)
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except ValueError:
        raise errors.InvalidPayload("The body is not a form that can be read.", field="body") from None
    form = dict(pairs)
    if len(form) != len(pairs) or any("\x00" in value for value in form.values()):
        raise errors.InvalidPayload("A field of the form is there more than once, or holds the character U+0000.", field="body")
    return form


def _wanted(form: Mapping[str, str], name: str) -> str:
    return problems.required(form, name, 8192)


def _client(request: Request, form: Mapping[str, str]) -> auth_pb2.ClientCredentialsGrant:
    """The client and its secret: in `Authorization: Basic`, or in the form, not in both."""
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return auth_pb2.ClientCredentialsGrant(client_id=_wanted(form, "client_id"), client_secret=_wanted(form, "client_secret"))
    if _CLIENT & set(form):
        raise errors.InvalidPayload("client_id and client_secret come either in Authorization or in the form", field="client_id")
    try:
        name, _, secret = base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise errors.Unauthenticated("The client id or its secret is wrong.") from None
    return auth_pb2.ClientCredentialsGrant(client_id=unquote_plus(name), client_secret=unquote_plus(secret))


def _oauth_refusal(error: errors.NetraError, kind: str) -> Response:
    """The problem, with what RFC 6749 calls it."""
    name, code = _oauth_name(error, kind)
    headers = {"WWW-Authenticate": 'Basic realm="netra"'} if name == "invalid_client" else {}
    return problems.response(error, code, headers, {"error": name, "error_description": error.message})


def _oauth_name(error: errors.NetraError, kind: str) -> tuple[str, int | None]:
    field = error.details.get("field", "")
    if isinstance(error, errors.Unauthenticated):
        if kind == _EXCHANGE and field == "subject_token":
            return "invalid_request", 400
        return ("invalid_client", 401) if kind in ("client_credentials", _EXCHANGE) else ("invalid_grant", 400)
    if field == "grant_type" and kind:
        return "unsupported_grant_type", 400
    if "scope" in field:
        return "invalid_scope", 400
    if isinstance(error, errors.PermissionDenied):
        return "unauthorized_client", None
    return _OAUTH_ERROR.get(error.code, "invalid_request"), None
