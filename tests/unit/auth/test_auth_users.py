"""What makes a valid new user."""

import pytest

from netra import errors
from services.auth import oidc, users

GOOD = "a good password"


def test_email_is_stored_in_lower_case() -> None:
    assert users.wanted(" Ann@Netra.Example ", GOOD, [], "").email == "ann@netra.example"


def test_defaults_are_the_least() -> None:
    user = users.wanted("ann@netra.example", GOOD, [], "")
    assert (user.roles, user.tier) == (("user",), "free")


def test_mid_is_business() -> None:
    assert users.wanted("ann@netra.example", GOOD, ["admin", "user", "user"], "mid").tier == "business"


@pytest.mark.parametrize(
    "email", ["", "ann", "ann@", "@x", "a b@x.y", "ann@x.y\0", "ann@x\n.y", "änn@x.y", "an\N{KELVIN SIGN}@x.y", f"a@{'x' * 260}", "a@b@c"]
)
def test_what_is_no_email_is_refused(email: str) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        users.wanted(email, GOOD, [], "")
    assert caught.value.details["field"] == "email"


def test_without_a_password_a_user_is_invited() -> None:
    assert users.wanted("ann@netra.example", "", [], "").password == ""


@pytest.mark.parametrize(("password", "fine"), [("x" * 11, False), ("x" * 12, True), ("x" * 1024, True), ("x" * 1025, False)])
def test_password_length(password: str, fine: bool) -> None:
    if fine:
        assert users.wanted("ann@netra.example", password, [], "").password == password
    else:
        with pytest.raises(errors.InvalidPayload, match="password"):
            users.wanted("ann@netra.example", password, [], "")


@pytest.mark.parametrize(
    ("roles", "tier", "field"), [(["god"], "", "roles"), (["Admin"], "", "roles"), ([], "gold", "tier"), ([], "Free", "tier")]
)
def test_unknown_role_or_tier_is_refused(roles: list[str], tier: str, field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        users.wanted("ann@netra.example", GOOD, roles, tier)
    assert caught.value.details["field"] == field


@pytest.mark.parametrize(("email", "known"), [("Ann@Netra.Example", "ann@netra.example"), ("an\N{KELVIN SIGN}@netra.example", "")])
def test_an_address_that_a_provider_has_verified_is_nobody_elses(email: str, known: str) -> None:
    assert oidc._person({"sub": "1", "email": email, "email_verified": True}).email == known
