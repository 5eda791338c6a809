"""The policy, compiled: what it does not name nobody has."""

from __future__ import annotations

import pytest

from chassis import rules, trust
from netra import errors
from netra.auth.v1 import auth_pb2

POLICY = auth_pb2.Policy(
    version=7,
    grants=[
        auth_pb2.Grant(role="user", tier="free", permissions=["runs:read"]),
        auth_pb2.Grant(role="admin", tier="free", permissions=["users:read"]),
    ],
    limits=[auth_pb2.TierLimits(tier="free", sockets=3)],
    tools=[auth_pb2.ToolRule(tool=name) for name in ("*", "data.*", "data.read.*", "data.read")],
    features=[auth_pb2.FeatureRule(feature="sso", tiers=["enterprise", "internal"]), auth_pb2.FeatureRule(feature="none")],
)


def test_roles_add_up_and_unknown_ones_have_nothing() -> None:
    compiled = rules.Rules(POLICY)
    assert compiled.permissions(["user", "admin"], "free") == {"runs:read", "users:read"}
    assert compiled.permissions(["user", "root"], "free") == {"runs:read"}
    assert compiled.permissions(["user"], "business") == compiled.permissions([], "free") == frozenset()


def test_a_tier_without_limits_is_entitled_to_nothing() -> None:
    assert rules.Rules(POLICY).limits("free").sockets == 3
    assert rules.Rules(POLICY).limits("gold") == auth_pb2.TierLimits(tier="gold", artifacts=0, artifact_bytes=0)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("data.read", "data.read"), ("data.read.one", "data.read.*"), ("data.reader", "data.*"), ("data.", "data.*"), ("text", "*")],
)
def test_the_rule_that_fits_best_counts(name: str, pattern: str) -> None:
    found = rules.Rules(POLICY).tool(name)
    assert found is not None
    assert found.tool == pattern
    assert rules.Rules(auth_pb2.Policy()).tool(name) is None


async def test_a_feature_without_a_rule_is_off_and_the_tiers_that_have_it_are_named() -> None:
    known = trust.Trust()
    assert known.policy_version == 0
    await known.apply(auth_pb2.WatchTrustResponse(policy=POLICY))
    assert known.policy_version == 7
    known.require_feature("enterprise", "sso")
    refused = {}
    for feature in ("sso", "none", "unheard"):
        with pytest.raises(errors.PermissionDenied) as caught:
            known.require_feature("free", feature)
        refused[feature] = caught.value
    assert {feature: error.details["tiers"] for feature, error in refused.items()} == {
        "sso": "enterprise,internal",
        "none": "",
        "unheard": "",
    }
    assert refused["sso"].message == "The feature sso is not part of the tier free: it comes with enterprise, internal."
