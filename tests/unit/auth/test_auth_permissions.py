"""Role x tier -> permissions, and the policy made of it."""

import itertools

import pytest

from chassis import identity
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from services.auth import permissions, policy


def test_roles_and_tiers_are_those_that_tokens_may_name() -> None:
    assert set(permissions.ROLES) == identity.ROLES == set(permissions.OF_ROLE)
    assert set(permissions.TIERS) == identity.TIERS == set(permissions.OF_TIER)


def test_every_permission_that_an_rpc_asks_for_is_granted_to_administrators_of_the_installation() -> None:
    files = (auth_pb2, context_pb2, dispatcher_pb2, events_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    asked = {method.GetOptions().Extensions[access_pb2.rule].permission for service in services for method in service.methods}
    assert asked - {""} <= permissions.of(["admin"], "internal")


@pytest.mark.parametrize("tier", permissions.TIERS)
def test_what_concerns_all_tenants_is_for_those_who_run_the_installation(tier: str) -> None:
    assert ({"policy:write", "audit:export", "tools:register"} <= permissions.of(["admin"], tier)) == (tier == "internal")
    assert not {"policy:write", "audit:export", "tools:register"} & permissions.of(["user", "readonly"], tier)


@pytest.mark.parametrize("tier", permissions.TIERS)
def test_readonly_reads_and_signs_out_and_no_more(tier: str) -> None:
    allowed = permissions.of(["readonly"], tier)
    assert {permission for permission in allowed if not permission.endswith(":read")} == {"data:export", "session:write"}


@pytest.mark.parametrize("tier", permissions.TIERS)
def test_users_may_all_but_administer(tier: str) -> None:
    assert permissions.ALL - permissions.of(["user"], tier) == {
        "users:read", "users:write", "policy:read", "policy:write", "audit:read", "audit:export", "contexts:audit",
        "tools:register",
    }  # fmt: skip


def test_unknown_role_or_tier_may_nothing() -> None:
    assert permissions.of(["root"], "free") == permissions.of(["admin"], "gold") == permissions.of([], "free") == frozenset()


def test_roles_add_up() -> None:
    assert permissions.of(["readonly", "user"], "free") == permissions.of(["user"], "free")


def test_policy_has_one_grant_for_each_role_in_each_tier() -> None:
    grants = policy.default().grants
    pairs = [(grant.role, grant.tier) for grant in grants]
    assert len(pairs) == len(set(pairs)) == len(permissions.ROLES) * len(permissions.TIERS)
    assert all(frozenset(grant.permissions) == permissions.granted(grant.role, grant.tier) for grant in grants)


def test_the_policy_of_the_code_is_valid_and_in_its_one_form() -> None:
    assert policy.checked(policy.default()).features == policy.default().features
    assert policy.checked(policy.default()).limits == policy.default().limits


def test_more_expensive_tiers_have_more_of_everything() -> None:
    figures = [list(permissions.LIMITS[tier].values()) for tier in permissions.TIERS]
    for lower, higher in itertools.pairwise(figures):
        assert all(less <= more for less, more in zip(lower, higher, strict=True))
    assert all(permissions.LIMITS[tier].keys() == permissions.LIMITS["free"].keys() for tier in permissions.TIERS)


@pytest.mark.parametrize(
    ("tier", "features"),
    [
        ("free", {"basic_agents"}),
        ("early", {"basic_agents"}),
        ("business", {"basic_agents", "advanced_agents", "integrations_basic"}),
        ("enterprise", set(permissions.FEATURES)),
        ("internal", set(permissions.FEATURES)),
    ],
)
def test_features_come_with_tiers(tier: str, features: set[str]) -> None:
    assert {name for name, tiers in permissions.FEATURES.items() if tier in tiers} == features


def test_mid_is_business_in_a_policy_too() -> None:
    wanted = policy.default()
    wanted.tools.add(tool="a", tiers=["mid"])
    assert list(policy.checked(wanted).tools[0].tiers) == ["business"]
