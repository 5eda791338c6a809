"""Who is there, and what each has: a canary in all they write, ids that others send, and ids that nobody ever sends."""

from __future__ import annotations

import base64
import re
import secrets
from dataclasses import dataclass, field

from netra import ids
from tests.fixtures.canaries import Canary
from tests.prove import people

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# what says of which thing something is: in an answer, none of them may be another user's
ID_FIELDS = frozenset(
    (
        "user_id email tenant_id owner_id session_id thread_id run_id context_id artifact_id message_id key_id event_id tool_call_id"
        " approval_id"
    ).split()
)


@dataclass(slots=True)
class Things:
    """What somebody has. `ids` are sent by others; `hidden` are of further things of the same kinds, which nobody else names."""

    ids: dict[str, str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    pages: dict[str, str] = field(default_factory=dict)
    grant_token: str = ""
    context_token: str = ""

    def __getitem__(self, kind: str) -> str:
        return self.ids[kind]


@dataclass(slots=True)
class Party(people.Person):
    """A person of the proof. `boss` administers their tenant; who `rules` sees all of it."""

    name: str
    canary: str
    things: Things = field(default_factory=Things)
    boss: Party | None = None
    rules: bool = False
    # with which request id each example was last asked
    request_ids: dict[str, str] = field(default_factory=dict)

    @property
    def email(self) -> str:
        """Their address."""
        return self.user.email

    def word(self) -> str:
        """A text that nobody else writes, another one each time; good for a request id that nobody else sends."""
        return f"{self.canary}.{secrets.token_hex(8)}"

    def once(self) -> str:
        """A request id that others may send, too."""
        return ids.uuid7()

    def with_things_of(self, other: Party) -> Party:
        """This person, who names what is another's."""
        return Party(self.user, self.token, self.name, self.canary, other.things, self.boss, self.rules)


def canary(name: str) -> str:
    """A fresh one."""
    return f"kx{name.lower()}{secrets.token_hex(18)}"


def forms(party: Party) -> list[bytes]:
    """How what they wrote would look, wherever it turned up."""
    return list(Canary(party.name, party.canary).forms())


# what stands for a thing that does not exist, in the form of one that does


def twin(kind: str, value: str) -> str:
    """A value of the same form that names nothing."""
    if kind == "email":
        local, _, domain = value.partition("@")
        return f"{_alike(local)}@{domain}"
    if kind in ("correlation_id", "prefix"):
        return value[:4] + _alike(value[4:]) if kind == "prefix" else _alike(value)
    if kind.startswith("page:"):
        return _page(value)
    return ids.uuid7()


def _alike(text: str) -> str:
    """Another text with digits, small and capital letters where this one has them: what is refused for its form, both are."""
    kinds = ((str.isdigit, "0123456789"), (str.islower, "abcdef"), (str.isupper, "ABCDEF"))
    return "".join(next((secrets.choice(among) for is_one, among in kinds if is_one(letter)), letter) for letter in text)


def _page(token: str) -> str:
    """The same page token with other ids in it."""
    padded = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    other = base64.urlsafe_b64encode(_UUID.sub(lambda _: ids.uuid7(), padded).encode()).decode()
    return other if token.endswith("=") or len(token) % 4 == 0 else other.rstrip("=")
