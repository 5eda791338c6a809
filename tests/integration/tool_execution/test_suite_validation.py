"""The suite of tool execution itself: it is whole, and what it needs is there."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from netra.dispatcher.v1 import dispatcher_pb2 as pb
from tests.fixtures.storage import Services
from tests.integration.conftest import Runs

_HERE = Path(__file__).parent
FILES = {
    "test_tool_registration_discovery": 5,
    "test_tool_execution_timeout_handling": 5,
    "test_tool_security_sandboxing": 5,
    "test_tool_dispatcher_factory_isolation": 5,
    "test_multi_tool_orchestration_flows": 5,
    "test_websocket_tool_execution_integration": 5,
}


def names_in(path: Path) -> list[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node.name for node in ast.walk(tree) if isinstance(node, kinds) and node.name.startswith("test_")]


@pytest.mark.real_services
class TestToolExecutionSuiteValidation:
    """The suite."""

    def test_all_tool_execution_test_files_importable(self) -> None:
        for name in FILES:
            path = _HERE / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"looked_at_{name}", path)
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))

    def test_core_dependencies_available_for_tool_execution_tests(self) -> None:
        for package in ("grpcio", "asyncpg", "redis", "jsonschema-rs", "pydantic-monty", "pyseccomp", "stamina", "pytest-asyncio"):
            assert importlib.metadata.version(package)
        for module in ("dispatch", "registry", "permits", "sandbox.sandboxes", "sandbox.python", "sandbox.script", "sandbox.command"):
            assert importlib.import_module(f"services.dispatcher.tools.{module}")

    async def test_real_services_integration_requirements(self, services: Services) -> None:
        """PostgreSQL, Valkey and the four services are real, and a tool can be called through them."""
        await services.all()
        user = await services.user()
        asked = pb.ListToolsRequest(tag="demo")
        found = await Runs(services).dispatcher.ListTools(asked, metadata=user.bearer, wait_for_ready=True, timeout=20)
        assert [one.name for one in found.tools] == ["demo_action", "demo_analysis", "demo_optimization"]

    def test_tool_execution_test_suite_coverage(self) -> None:
        counted = {name: len(names_in(_HERE / f"{name}.py")) for name in FILES}
        assert all(counted[name] >= least for name, least in FILES.items()), counted
        assert sum(counted.values()) >= 30
        # nothing in them stands for a part of ours
        for path in [*_HERE.glob("test_*.py"), _HERE.parent / "tools" / "test_unified_tool_dispatcher_comprehensive.py"]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imported = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not any("mock" in line.lower() for line in imported), path
