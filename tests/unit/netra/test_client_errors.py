"""What the gateway says becomes the typed error that the service raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from netra import api, credentials, errors


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("BUSY", errors.Busy),
        ("BAD_JSON", errors.BadJson),
        ("INVALID_PAYLOAD", errors.InvalidPayload),
        ("FRAME_TOO_LARGE", errors.TooLarge),
        ("NO_SUCH_CODE", errors.Internal),
    ],
)
def test_codes_become_classes(code: str, kind: type[errors.NetraError]) -> None:
    found = api.error_of({"code": code, "message": "m", "details": {"field": "f"}, "retry_after_ms": 5, "correlation_id": "c"})
    assert type(found) is kind
    assert (found.message, found.details, found.retry_after_ms) == ("m", {"field": "f", "correlation_id": "c"}, 5)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, errors.Unauthenticated), (403, errors.PermissionDenied), (404, errors.NotFound), (502, errors.Unavailable)],
)
def test_a_response_of_somebody_else_becomes_an_error_too(status: int, kind: type[errors.NetraError]) -> None:
    assert type(api.error_of_response(status, b"<html>")) is kind


def test_a_problem_becomes_its_error() -> None:
    problem = json.dumps({"code": "QUOTA_EXCEEDED", "message": "m", "details": {}}).encode()
    assert isinstance(api.error_of_response(429, problem), errors.QuotaExceeded)


def test_this_machine_needs_no_proxy() -> None:
    assert api.direct("http://127.0.0.1:8080")
    assert api.direct("http://[::1]:8080")
    assert not api.direct("https://netra.example")


def test_the_running_stack_of_a_checkout_is_found_from_below(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert credentials.standalone(below) is None
    (tmp_path / ".netra").mkdir()
    state = {"gateway_url": "http://127.0.0.1:1", "dev_email": "dev@netra.example", "dev_password_file": ".netra/secret"}
    (tmp_path / ".netra" / "state.json").write_text(json.dumps(state))
    assert credentials.standalone(below) == credentials.Standalone("http://127.0.0.1:1", "dev@netra.example", tmp_path / ".netra/secret")


def test_a_state_file_of_another_shape_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".netra").mkdir()
    for text in ("", "[]", "{}", "null"):
        (tmp_path / ".netra" / "state.json").write_text(text)
        assert credentials.standalone(tmp_path) is None


def test_a_sign_in_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    store = credentials.Store(tmp_path / "netra")
    store.keep("http://a", {"access_token": "t", "refresh_token": "r", "expires_in": 600})
    assert store.has("http://a")
    assert not store.has("http://b")
    assert (tmp_path / "netra" / "credentials.json").stat().st_mode & 0o777 == 0o600
