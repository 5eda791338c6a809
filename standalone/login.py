"""Development logins: makes users on this machine and signs them in."""

import re
import secrets as random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from standalone import folder, health, processes
from standalone.errors import StandaloneError

if TYPE_CHECKING:
    from netra.auth.v1 import auth_pb2_grpc

DEVELOPER = "dev"
DOMAIN = processes.BOOTSTRAP_ADMIN.rpartition("@")[2]
TIMEOUT = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}(@[A-Za-z0-9.-]{1,128})?")


def email_of(user: str) -> str:
    """`alice` is `alice@netra.example`; an address stays what it is."""
    if not _NAME.fullmatch(user):
        raise StandaloneError(f"{user!r} is no name for a user", "use letters, digits, . _ + -")
    return user if "@" in user else f"{user}@{DOMAIN}"


def password_file(place: folder.Folder, user: str) -> Path:
    """Where the password of a development user is kept."""
    if email_of(user) == processes.BOOTSTRAP_ADMIN:
        return place.secrets / "auth" / "bootstrap_admin"
    return place.secrets / "users" / email_of(user)


def running(place: folder.Folder) -> dict[str, Any]:
    """The state of the running stack; raises with the remedy when none runs."""
    state = place.state()
    if place.holder() is None or "ports" not in state:
        raise StandaloneError(f"no Netra is running out of {place.path}", "start it with: make run")
    return state


async def access_token(place: folder.Folder, user: str = DEVELOPER, role: str = "user", tier: str = "internal") -> str:
    """An access token of a development user, who is made first if need be.

    Role and tier count when the user is made. `dev` exists from the start and is an admin.
    """
    from netra.auth.v1 import auth_pb2_grpc

    port = running(place)["ports"]["auth"]
    place = place.as_running()
    password = _password(password_file(place, user))
    async with health.channel(f"{processes.LOOPBACK}:{port}") as channel:
        stub = auth_pb2_grpc.AuthServiceStub(channel)
        if token := await _sign_in(stub, email_of(user), password):
            return token
        await _create(place, stub, user, role, tier)
        if token := await _sign_in(stub, email_of(user), password):
            return token
    raise StandaloneError(
        f"{email_of(user)} cannot sign in with the password kept for it",
        f"put the right one into {password_file(place, user)}, or use another name",
    )


def _password(file: Path) -> str:
    """The kept password, or a new one, kept."""
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.write_private(file, random.token_urlsafe(24) + "\n")
    return file.read_text().strip()


async def _sign_in(stub: "auth_pb2_grpc.AuthServiceAsyncStub", email: str, password: str) -> str:
    """An access token; empty when the service does not accept the password."""
    import grpc

    from netra.auth.v1 import auth_pb2

    grant = auth_pb2.PasswordGrant(email=email, password=password)
    request = auth_pb2.IssueTokenRequest(password=grant, device="netra token")
    try:
        answer = await stub.IssueToken(request, timeout=TIMEOUT)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return ""
        raise StandaloneError(f"the auth service answers {error.code().name}: {error.details()}", "see: netra doctor") from error
    return str(answer.tokens.access_token)


async def _create(place: folder.Folder, stub: "auth_pb2_grpc.AuthServiceAsyncStub", user: str, role: str, tier: str) -> None:
    import grpc

    from netra.auth.v1 import auth_pb2

    admin = await _sign_in(stub, processes.BOOTSTRAP_ADMIN, _password(password_file(place, DEVELOPER)))
    if not admin:
        raise StandaloneError(f"the development admin {processes.BOOTSTRAP_ADMIN} cannot sign in", "start afresh: make reset")
    request = auth_pb2.CreateUserRequest(email=email_of(user), password=_password(password_file(place, user)), roles=[role], tier=tier)
    try:
        await stub.CreateUser(request, timeout=TIMEOUT, metadata=(("authorization", f"Bearer {admin}"),))
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.ALREADY_EXISTS:
            raise StandaloneError(f"cannot make {email_of(user)}: {error.details()}") from error
