"""What a process trusts survives its restart, and a damaged snapshot does not keep it from starting."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import trust
from netra import ids
from netra.auth.v1 import auth_pb2


def _update(session_id: str) -> auth_pb2.WatchTrustResponse:
    public_key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    revocation = auth_pb2.Revocation(session_id=session_id)
    revocation.revoked_at.FromSeconds(int(time.time()))
    return auth_pb2.WatchTrustResponse(
        keys=[auth_pb2.Key(kid="k1", public_key=public_key, issuer="auth")],
        policy=auth_pb2.Policy(version=1, grants=[auth_pb2.Grant(role="user", tier="free", permissions=["runs:read"])]),
        revocations=[revocation],
    )


async def test_a_restart_remembers_keys_policy_and_revocations(tmp_path: Path) -> None:
    session_id = ids.uuid7()
    await trust.Trust(tmp_path).apply(_update(session_id))
    again = trust.Trust(tmp_path)
    await again.restore()
    assert again.ready
    assert again.revoked(session_id)
    assert again.permissions(["user"], "free") == {"runs:read"}


async def test_a_damaged_snapshot_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "trust.bin").write_bytes(b"\xff\xff\xff")
    known = trust.Trust(tmp_path)
    await known.restore()
    assert not known.ready


async def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    known = trust.Trust(tmp_path / "file" / "folder")
    await known.apply(_update(ids.uuid7()))
    assert known.ready
