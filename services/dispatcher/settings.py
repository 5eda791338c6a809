"""DispatcherSettings."""

import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field

from chassis.settings import ProcessSettings


class DispatcherSettings(ProcessSettings):
    """What the dispatcher reads beside what every process reads."""

    port: int = Field(7003, validation_alias="NETRA_DISPATCHER_PORT", ge=0, le=65535)
    lease_s: float = Field(3.0, gt=0.5, description="How long a silent owner keeps a run, in seconds.")
    poll_s: float = Field(0.5, gt=0, description="How often the queue is looked at without being told, in seconds.")
    slots: int = Field(200, gt=0, description="Runs that one process executes at a time.")
    queued_per_user: int = Field(10_000, gt=0, description="Runs that one user may have waiting, whatever their tier allows.")
    queued_total: int = Field(100_000, gt=0, description="Runs that may wait in all; more are refused for a moment.")
    queued_s: float = Field(86_400.0, gt=0, description="How long a run may wait for its start, in seconds.")
    suspended_s: float = Field(604_800.0, gt=0, description="How long a run may wait for a message or an approval, in seconds.")
    takeovers: int = Field(10, ge=0, description="Owners of a run that may die in a row before it is given up.")
    version_missing_s: float = Field(600.0, gt=0, description="How long nobody may have a run's agent in its version, in seconds.")
    agent_silent_s: float = Field(10.0, gt=0, description="How long an agent may take no step and have none under way, in seconds.")
    engine_history: int = Field(100, ge=0, description="Executions that are remembered of each user.")
    agents_per_user: int = Field(50, gt=0, description="Agents of one user's session.")
    session_age_s: float = Field(86_400.0, gt=0, description="How long a session of a user's agents is kept, in seconds.")
    tokens_s: float = Field(60.0, gt=0, description="How often old context tokens are renewed, in seconds.")
    runs_sweep_s: float = Field(3600.0, gt=0, description="How often runs that ended longer ago than their tier is kept are dropped.")
    default_agent: str = "supervisor"
    max_deadline_s: float = Field(86_400.0, gt=0)
    work_dir: Path | None = Field(None, description="Where runs keep files while they run; of this user alone.")
    tool_processes: int = Field(4, gt=0, description="Tools that do their work in a process of their own, at a time.")
    tool_workers: int = Field(4, ge=2, description="Plain functions of tools that run at a time, each in a warm process.")
    tool_worker_spares: int = Field(2, ge=1, description="Such processes beside them that have served nobody and are kept ready.")
    tool_worker_memory: int = Field(0, ge=0, description="Bytes of address space of such a process; 0 is any.")
    sandbox_tiers: str = Field("script,python,command", description="The tiers that are started and probed, separated by commas.")
    sandbox_calls: int = Field(8, gt=0, description="Contained calls that run at a time, in each tier.")
    sandbox_first_uid: int = Field(200_000, ge=1000, description="Of root: 30,000 users of the machine for contained calls begin here.")
    sandbox_limits: dict[str, dict[str, float]] = Field({}, description="What one contained call may take, by tier of its user; JSON.")
    sandbox_modules: str = Field("", description="Modules that Python code in the sandbox may import beside those of tools.")
    dispatchers_per_user: int = Field(10, gt=0, description="Dispatchers one user may have open, unless their tier has more runs.")
    dispatchers_when_full: Literal["evict", "reject"] = Field("evict", description="Whether the one idle for longest gives way.")
    tool_calls: int = Field(1000, gt=0, description="Tool calls that one process has at hand.")
    tool_calls_per_user: int = Field(200, gt=0, description="How many of them one user may have.")
    tool_calls_waiting: int = Field(200, ge=0, description="Calls that wait for a place of one tool.")
    breaker_failures: int = Field(5, ge=0, description="Failures in a row after which a tool is left alone; 0 is never.")
    breaker_open_s: float = Field(30.0, gt=0, description="For how long, in seconds.")
    quarantine_violations: int = Field(10, ge=0, description="Violations after which a tool is in quarantine; 0 is never.")
    quarantine_s: float = Field(3600.0, gt=0, description="Within which time, and for how long, in seconds.")

    def workspaces(self) -> Path:
        """The folder for files of runs: as set, else below the state, else in the system's temporary folder."""
        if self.work_dir is not None:
            return self.work_dir
        return Path(tempfile.gettempdir()) / f"netra-work-{os.getuid()}" if self.state_dir is None else self.state_dir / "work"
