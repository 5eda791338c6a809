"""What the documents and lock files say can be held against the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from gateway.settings import GatewaySettings
from services.auth.settings import AuthSettings
from services.context.settings import ContextSettings
from services.dispatcher.settings import DispatcherSettings
from services.dispatcher.tools.spend import columns
from services.events.settings import EventsSettings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [AuthSettings, ContextSettings, DispatcherSettings, EventsSettings, GatewaySettings]


def _variable(name: str, field: FieldInfo) -> str:
    return str(field.validation_alias or f"NETRA_{name.upper()}")


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_is_documented(settings: type[AuthSettings]) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    missing = [name for name, field in settings.model_fields.items() if f"`{_variable(name, field)}`" not in text]
    assert missing == []


def test_every_rpc_is_named() -> None:
    text = (ROOT / "protos" / "README.md").read_text(encoding="utf-8")
    protos = [file.read_text(encoding="utf-8") for file in (ROOT / "protos").rglob("*.proto")]
    assert [
        name for proto in protos for name in re.findall(r"^  rpc (\w+)", proto, re.MULTILINE) if not re.search(rf"\b{name}\b", text)
    ] == []


def test_every_name_that_a_column_is_known_by_is_documented() -> None:
    text = (ROOT / "docs" / "analyst.md").read_text(encoding="utf-8")
    known = {name for style in columns.STYLES for names in (style.signature, *style.roles.values()) for name in names}
    known |= {name for groups in columns.GENERIC.values() for names in groups for name in names}
    assert sorted(name for name in known if f"`{name}`" not in text) == []


def test_the_figure_that_is_computed_by_hand_is_the_one_of_the_first_conversation() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "analyst.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"Total cost  {done.stdout.strip()} USD" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_lock_file_names_an_address() -> None:
    files = [*(ROOT / "requirements").glob("*.txt"), *ROOT.glob("web/**/package-lock.json")]
    assert files
    for file in files:
        assert not re.search(r"https?://|file:|--(extra-)?index|--find-links", file.read_text(encoding="utf-8")), file


def test_links_between_documents_lead_somewhere() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    broken = [
        f"{name}: {target}"
        for name in listed
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", (ROOT / name).read_text(encoding="utf-8"))
        if not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert broken == []
