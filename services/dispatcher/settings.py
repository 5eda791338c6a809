"""DispatcherSettings."""

import os
import tempfile
from pathlib import Path

from pydantic import Field

from chassis.settings import ProcessSettings


class DispatcherSettings(ProcessSettings):
    """What the dispatcher reads beside what every process reads."""

    port: int = Field(7003, validation_alias="NETRA_DISPATCHER_PORT", ge=0, le=65535)
    lease_s: float = Field(3.0, gt=0.5, description="How long a silent owner keeps a run, in seconds.")
    poll_s: float = Field(0.5, gt=0, description="How often the queue is looked at without being told, in seconds.")
    slots: int = Field(200, gt=0, description="Runs that one process executes at a time.")
    queued_per_user: int = Field(10_000, gt=0, description="Runs that one user may have waiting, whatever their tier allows.")
    tokens_s: float = Field(60.0, gt=0, description="How often old context tokens are renewed, in seconds.")
    default_agent: str = "supervisor"
    max_deadline_s: float = Field(86_400.0, gt=0)
    work_dir: Path | None = Field(None, description="Where runs keep files while they run; of this user alone.")
    tool_processes: int = Field(4, gt=0, description="Tools that do their work in a process of their own, at a time.")

    def workspaces(self) -> Path:
        """The folder for files of runs: as set, else below the state, else in the system's temporary folder."""
        if self.work_dir is not None:
            return self.work_dir
        return Path(tempfile.gettempdir()) / f"netra-work-{os.getuid()}" if self.state_dir is None else self.state_dir / "work"
