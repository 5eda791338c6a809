"""The gateway's HTTP resources: sign in, list, read the record of a run, move files."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

from netra import errors, files, ids

Token = str | Callable[[], Awaitable[str]]
TERMINAL = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})
_TIMEOUT = httpx.Timeout(15.0, connect=5.0)
_PAGE = 1000
_ATTEMPTS = 40
_PAUSE_S = 0.25


def direct(url: str) -> bool:
    """Whether the address is this machine, which no proxy can reach."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _believed(url: str) -> ssl.SSLContext | bool:
    """Whose certificates are good. Without TLS nobody's: to read those of this machine takes longer than most calls."""
    return True if urlsplit(url).scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _address(url: str) -> str:
    """The address without its last slash. Raises `InvalidPayload` when it cannot be that of a gateway."""
    try:
        httpx.URL(url)  # a control character is wrong for one, a port out of range for the other
        found = urlsplit(url)
        usable = found.scheme in ("http", "https") and found.hostname and found.port != 0 and not (found.query or found.fragment)
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise errors.InvalidPayload(
            f"{url!r} is not the address of a gateway, such as http://127.0.0.1:8080. Look at NETRA_URL or --url.", field="url"
        )
    return url.rstrip("/")


def error_of(frame: Mapping[str, Any]) -> errors.NetraError:
    """The typed error that an error frame or a problem describes."""
    kind = errors.by_code(str(frame.get("code", "")))
    found = kind(str(frame.get("message") or ""), retry_after_ms=frame.get("retry_after_ms"))
    found.details = {str(name): str(value) for name, value in (frame.get("details") or {}).items()}
    if frame.get("correlation_id"):
        found.details.setdefault("correlation_id", str(frame["correlation_id"]))
    return found


def error_of_response(status: int, body: bytes) -> errors.NetraError:
    """The typed error of a response that is not a success."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if isinstance(problem, dict) and "code" in problem:
        return error_of(problem)
    fallback = {401: errors.Unauthenticated, 403: errors.PermissionDenied, 404: errors.NotFound, 429: errors.RateLimited}
    kind = fallback.get(status, errors.InvalidPayload if 400 <= status < 500 else errors.Unavailable)
    return kind(f"The gateway answered {status}.")


class Api:
    """One gateway, in the name of one token (none for signing in). Reading is tried again for `patience_s`.

    `device` is what a sign-in made here is called in the list of devices.
    """

    def __init__(self, url: str, token: Token = "", *, patience_s: float = 0.0, device: str = "netra") -> None:
        self.url = _address(url)
        self._patience_s = patience_s
        self._token = token
        self._http = httpx.AsyncClient(
            base_url=self.url, timeout=_TIMEOUT, trust_env=not direct(self.url), headers={"User-Agent": device}, verify=_believed(self.url)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def token(self) -> str:
        """The access token in force."""
        return self._token if isinstance(self._token, str) else await self._token()

    async def login(self, email: str, password: str) -> dict[str, Any]:
        """Sign in. Returns access_token, refresh_token, expires_in, user_id; later calls use the access token."""
        tokens = await self._call("POST", "/auth/login", body={"email": email, "password": password}, signed=False)
        self._token = str(tokens["access_token"])
        return tokens

    async def refresh(self, refresh_token: str) -> dict[str, Any]:
        """Exchange a refresh token for a new pair; the old one is used up."""
        tokens = await self._call("POST", "/auth/refresh", body={"refresh_token": refresh_token}, signed=False)
        self._token = str(tokens["access_token"])
        return tokens

    async def logout(self) -> None:
        """End the session everywhere. Accepted runs go on."""
        await self._call("POST", "/auth/logout")

    async def me(self) -> dict[str, Any]:
        """Who the token says I am."""
        return await self._call("GET", "/v1/me")

    async def get_run(self, run_id: str) -> dict[str, Any]:
        """One run."""
        return await self._call("GET", f"/v1/runs/{run_id}")

    async def runs(self, page_size: int = 50, **filters: str) -> list[dict[str, Any]]:
        """My runs, newest first; filters: state, thread_id, page_token."""
        page = await self._call("GET", "/v1/runs", {"page_size": str(page_size), **filters})
        return list(page["runs"])

    async def tools(self, **filters: str) -> list[dict[str, Any]]:
        """All tools I may call; filters: text, tag, category, permission, tier, enforcement, parameter."""
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            page = await self._call("GET", "/v1/tools", {**filters, **({"page_token": token} if token else {})})
            found += page["tools"]
            # a gateway of an earlier release has no pages
            token = page.get("next_page_token", "")
            if not token:
                return found

    async def agents(self) -> list[dict[str, Any]]:
        """The agents I may start."""
        return list((await self._call("GET", "/v1/agents"))["agents"])

    async def cancel_run(self, run_id: str) -> str:
        """Ask a run to stop; returns its state now."""
        return str((await self._call("POST", f"/v1/runs/{run_id}:cancel"))["state"])

    async def send(self, run_id: str, message: str, *, thread_id: str = "", key: str = "") -> dict[str, Any]:
        """Say something to a run that goes on; what it waits for a message gets it. Returns run_id, message_id, delivered, state.

        With `thread_id` it may be anybody's run of that thread, when I may write to it. `key` makes it the same request when made again.
        Raises `FailedPrecondition` when the run has ended.
        """
        grant, key = await self._grant(thread_id), key or ids.uuid7()
        return await self._call("POST", f"/v1/runs/{quote(run_id, safe='')}:send", body={"message": message}, key=key, grant=grant)

    async def approvals(self, page_size: int = 50, *, thread_id: str = "", **filters: str) -> list[dict[str, Any]]:
        """What my runs asked for, newest first; with `thread_id` all runs of that thread. Filters: state, run_id, page_token."""
        query = {"page_size": str(page_size), **filters}
        page = await self._call("GET", "/v1/approvals", query, grant=await self._grant(thread_id))
        return list(page["approvals"])

    async def approval(self, approval_id: str, *, thread_id: str = "") -> dict[str, Any]:
        """One of them."""
        return await self._call("GET", f"/v1/approvals/{quote(approval_id, safe='')}", grant=await self._grant(thread_id))

    async def resolve(self, approval_id: str, decision: str, comment: str = "", *, thread_id: str = "") -> dict[str, Any]:
        """Say `approve` or `reject`; returns the approval as it is then. The same word again changes nothing.

        Raises `FailedPrecondition` when I had said something else, or it is decided or has expired.
        """
        body = {"decision": decision, "comment": comment}
        path = f"/v1/approvals/{quote(approval_id, safe='')}:resolve"
        return await self._call("POST", path, body=body, grant=await self._grant(thread_id))

    async def _grant(self, thread_id: str) -> str:
        return await self.grant_token(thread_id) if thread_id else ""

    async def upload(
        self, path: str | Path, *, name: str = "", media_type: str = "", thread_id: str = "", progress: files.Progress | None = None
    ) -> dict[str, Any]:
        """Keep a file: returns artifact_id, name, bytes, sha256, media_type, created_at. `progress` gets bytes sent, bytes in all.

        In a thread that I may write to, all who see the thread see it. Raises `NotFound` when there is no such thread, `InvalidPayload`
        when the file cannot be read, `TooLarge` when it is over a limit.
        """
        name = name or Path(path).name
        query = {"name": name} | ({"thread_id": thread_id} if thread_id else {})
        with files.Outgoing(Path(path), progress) as file:
            headers = {
                "Authorization": f"Bearer {await self.token()}",
                "Content-Type": media_type or files.media_type(name),
                "Content-Length": str(file.size),
                "Idempotency-Key": ids.uuid7(),
            }
            request = self._http.stream(
                "POST", "/v1/artifacts", params=query, headers=headers, content=file.pieces(), timeout=files.TIMEOUT
            )
            try:
                async with request as response:
                    body = await response.aread()
            except httpx.TransportError as error:
                raise errors.Unavailable(f"{self.url} cannot be reached. Is the gateway running?") from error
            if not response.is_success:
                raise error_of_response(response.status_code, body)
            found = self._object(body)
            if found.get("sha256") != file.sha256:
                raise errors.Unavailable("What arrived is not what was sent: its SHA-256 is another one. Send it again.")
        return found

    async def download(self, artifact_id: str, to: str | Path, progress: files.Progress | None = None) -> dict[str, Any]:
        """Write an artifact to a file, which is there only when it is whole; an interruption is gone on from for `patience_s`.

        Returns artifact_id, name, bytes, sha256, media_type. Raises `NotFound`, `InvalidPayload` when it cannot be written.
        """
        with files.Incoming(Path(to), progress) as file:
            headers = await self._received_whole(artifact_id, file)
            found = files.described(artifact_id, headers, file.size)
            file.finish(found["sha256"])
        return found

    async def _received_whole(self, artifact_id: str, file: files.Incoming) -> httpx.Headers:
        until = time.monotonic() + self._patience_s
        while True:
            before = file.size
            try:
                return await self._received(artifact_id, file)
            except (errors.Unavailable, httpx.TransportError) as error:
                if file.size > before:
                    until = time.monotonic() + self._patience_s
                if time.monotonic() >= until:
                    raise errors.Unavailable(f"{self.url} cannot be reached, or broke off. Try again.") from error
            await asyncio.sleep(_PAUSE_S)

    async def _received(self, artifact_id: str, file: files.Incoming) -> httpx.Headers:
        headers = {"Authorization": f"Bearer {await self.token()}"} | ({"Range": f"bytes={file.size}-"} if file.size else {})
        path = f"/v1/artifacts/{quote(artifact_id, safe='')}"
        async with self._http.stream("GET", path, headers=headers, timeout=files.TIMEOUT) as response:
            if response.status_code != (206 if file.size else 200):
                raise error_of_response(response.status_code, await response.aread())
            await file.take(response)
            return response.headers

    async def artifacts(self, page_size: int = 50, **filters: str) -> list[dict[str, Any]]:
        """My files, newest first; filters: page_token."""
        page = await self._call("GET", "/v1/artifacts", {"page_size": str(page_size), **filters})
        return list(page["artifacts"])

    async def delete_artifact(self, artifact_id: str) -> None:
        """Remove a file for good."""
        await self._call("DELETE", f"/v1/artifacts/{quote(artifact_id, safe='')}")

    async def threads(self, selection: str = "own", page_size: int = 50, **filters: str) -> list[dict[str, Any]]:
        """My threads (`own`), those shared with me (`shared`) or those I deleted (`deleted`), newest first; filters: page_token."""
        page = await self._call("GET", "/v1/threads", {"selection": selection, "page_size": str(page_size), **filters})
        return list(page["threads"])

    async def share(self, thread_id: str, who: str, access: str = "read") -> dict[str, Any]:
        """Let another user of my tenant, by e-mail address or id, `read` a thread of mine or `write` to it; again changes which."""
        named = {"email" if "@" in who else "grantee_id": who}
        return await self._call("POST", f"/v1/threads/{quote(thread_id, safe='')}/grants", body={**named, "access": access})

    async def unshare(self, thread_id: str, grantee_id: str) -> dict[str, Any]:
        """End that, at once; who follows the thread is cut off within minutes."""
        return await self._call("DELETE", f"/v1/threads/{quote(thread_id, safe='')}/grants/{quote(grantee_id, safe='')}")

    async def grants(self, thread_id: str, page_size: int = 50, **filters: str) -> list[dict[str, Any]]:
        """Whom a thread of mine is shared with, oldest first; filters: page_token."""
        page = await self._call("GET", f"/v1/threads/{quote(thread_id, safe='')}/grants", {"page_size": str(page_size), **filters})
        return list(page["grants"])

    async def grant_token(self, thread_id: str) -> str:
        """What shows all runs and events of a thread of mine, or one shared with me, for a few minutes. Raises `NotFound`."""
        return str((await self._call("POST", f"/v1/threads/{quote(thread_id, safe='')}/token"))["grant_token"])

    async def export(self) -> AsyncIterator[dict[str, Any]]:
        """Everything that is kept of me, a line each with its `kind`. Raises `Unavailable` when it broke off before its end."""
        headers = {"Authorization": f"Bearer {await self.token()}"}
        last: dict[str, Any] = {}
        try:
            async with self._http.stream("GET", "/v1/export", headers=headers, timeout=files.TIMEOUT) as response:
                if response.status_code != 200:
                    raise error_of_response(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    last = self._object(line)
                    yield last
        except httpx.TransportError as error:
            raise errors.Unavailable("The export broke off: what came is a part. Begin again.") from error
        if last.get("kind") != "end":
            raise errors.Unavailable("The export broke off: what came is a part. Begin again.")

    async def erase_thread(self, thread_id: str) -> dict[str, Any]:
        """Remove the content of a thread of mine for good, in the record as well. Again, it goes on with what is left, and says what was
        erased in all.
        """
        # no thread gets the id of another one: it is the same request whenever it is made
        key = str(uuid.uuid5(uuid.NAMESPACE_OID, f"netra erase {thread_id.lower()}"))
        return await self._call("POST", f"/v1/threads/{quote(thread_id, safe='')}:erase", key=key)

    async def erase_everything(self) -> dict[str, Any]:
        """Remove everything that is kept of me for good, but my account."""
        return await self._call("DELETE", "/v1/me/data")

    async def rpc(self, method: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call a unary RPC marked for the edge, such as `netra.auth.v1.AuthService/VerifyAudit`; 64-bit numbers come as text."""
        return await self._call("POST", f"/rpc/{method}", body=dict(request or {}))

    async def events(self, run_id: str, after: int = 0, *, follow: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The record of a run after a cursor; with `follow` until the run has ended."""
        if follow:
            async for event in self._followed(run_id, after):
                yield event
            return
        while True:
            page = await self._call("GET", f"/v1/runs/{run_id}/events", {"after": str(after), "limit": str(_PAGE)})
            for event in page["events"]:
                yield event
            if not page["events"] or int(page["next_after"]) <= after:
                return
            after = int(page["next_after"])

    async def _followed(self, run_id: str, after: int) -> AsyncIterator[dict[str, Any]]:
        attempts = 0
        while True:
            try:
                async for event in self._streamed(run_id, after):
                    attempts = 0
                    if "cursor" not in event:
                        # shown to those who watch, not recorded
                        continue
                    if event["cursor"] > after:
                        after = event["cursor"]
                        yield event
                    if event["type"] in TERMINAL:
                        return
                if not await self._running(run_id):
                    # the end may have come after the stream was cut
                    async for event in self.events(run_id, after):
                        after = event["cursor"]
                        yield event
                    return
            except (errors.Unavailable, httpx.TransportError) as error:
                attempts += 1
                if attempts > _ATTEMPTS:
                    raise errors.Unavailable(f"{self.url} cannot be reached.") from error
            await asyncio.sleep(_PAUSE_S)

    async def _running(self, run_id: str) -> bool:
        return (await self.get_run(run_id))["ended_at"] is None

    async def _streamed(self, run_id: str, after: int) -> AsyncIterator[dict[str, Any]]:
        headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {await self.token()}", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(30.0, connect=5.0)
        async with self._http.stream("GET", f"/v1/runs/{run_id}/events", headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                raise error_of_response(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    yield self._object(line.removeprefix("data: "))

    async def _call(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None, *, signed: bool = True,
        key: str = "", grant: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        until = time.monotonic() + (self._patience_s if method == "GET" else 0.0)
        while True:
            try:
                return await self._called_once(method, path, query, body, signed, {"Idempotency-Key": key, "X-Netra-Grant": grant})
            except errors.Unavailable:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(_PAUSE_S)

    async def _called_once(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Any, signed: bool, more: Mapping[str, str]
    ) -> dict[str, Any]:
        headers = {name: value for name, value in more.items() if value}
        if signed:
            headers["Authorization"] = f"Bearer {await self.token()}"
        try:
            response = await self._http.request(method, path, params=dict(query or {}), json=body, headers=headers)
        except httpx.TransportError as error:
            raise errors.Unavailable(f"{self.url} cannot be reached. Is the gateway running?") from error
        if not response.is_success:
            raise error_of_response(response.status_code, response.content)
        return {} if response.status_code == 204 else self._object(response.content)

    def _object(self, text: str | bytes) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise errors.Unavailable(f"{self.url} did not answer as a Netra gateway. Look at NETRA_URL or --url.")
        return found
