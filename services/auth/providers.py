"""The outside identity providers that the operator has named, and by which rules their people become users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import pydantic

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_NAME = r"^[a-z][a-z0-9\-]{0,63}$"


def secure(url: str) -> bool:
    """Whether a secret may be sent there: over TLS, or on this machine."""
    found = urlsplit(url)
    return bool(found.hostname) and (found.scheme == "https" or (found.scheme == "http" and found.hostname in _LOOPBACK))


def _secured(url: str) -> str:
    if not secure(url) or urlsplit(url).fragment or urlsplit(url).username:
        raise ValueError("must be an https address (http only on this machine), without user and fragment")
    return url


Address = Annotated[str, pydantic.AfterValidator(_secured)]


class Provider(pydantic.BaseModel):
    """One provider. `redirects` are the exact pages of frontends that a sign-in may come back to."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    issuer: Address
    client_id: str = pydantic.Field(min_length=1)
    client_secret: pydantic.SecretStr
    scope: str = "openid email profile"
    redirects: tuple[Address, ...] = ()
    # a person with a verified address is the user who has that address
    link_verified_email: bool = False
    # also when that user is an administrator
    link_admins: bool = False
    # a person whom nobody knows becomes a user
    create_users: bool = False
    roles: tuple[Literal["user", "readonly"], ...] = ("user",)
    tier: Literal["free", "early", "business", "enterprise", "internal"] = "free"
    # the tenant of users who are made, and the only one whose users are let in; without one each who is made gets their own
    tenant_id: pydantic.UUID7 | None = None

    @pydantic.field_validator("scope")
    @classmethod
    def _openid(cls, value: str) -> str:
        if "openid" not in value.split():
            raise ValueError("must contain openid")
        return value


class _File(pydantic.RootModel[dict[Annotated[str, pydantic.StringConstraints(pattern=_NAME)], Provider]]):
    pass


def load(path: Path) -> dict[str, Provider]:
    """The providers by name; none when there is no file. Raises `ValueError` naming the file and what is wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return _File.model_validate(json.loads(text)).root
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError(f"{path}: {problems}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
