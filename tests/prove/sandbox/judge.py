"""What is off in what the suites found; pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MOST_LATE_MS, LEAST_ATTACKS, LEAST_FAMILIES = 250.0, 60, 20
_NO_WALLS = ("trusted",)


def off(reports: Sequence[Mapping[str, Any]], active: Mapping[str, Mapping[str, Any]], *, endings: int) -> list[str]:
    """A sentence for each thing that is not as it must be.

    `reports` are those of the suites, as JSON; one that ended without a word has an `error`. `active` are the tiers of a dispatcher that
    is started here, each with `available`, `unprobed` (what was said of it before its probe), `reason` and `refused`. `endings` is how
    many calls had to come to their deadline, for each tier that is available.
    """
    found = [f"{_who(report)}: {what}" for report in reports for what in _of(report, endings)]
    for tier, said in active.items():
        if said["unprobed"]:
            found.append(f"{tier}: it says that it is available before it was probed")
        held = any(report["tier"] == tier and report.get("available") for report in reports)
        if said["available"] and not held:
            found.append(f"{tier}: it is available in a dispatcher, and was not attacked")
        if not said["available"] and not (said["reason"] and said["refused"]):
            found.append(f"{tier}: it is not available, and not refused with a reason")
    if not any(report.get("available") and report.get("attacks") for report in reports):
        found.append("nothing was attacked: no tier is available")
    return found


def _who(report: Mapping[str, Any]) -> str:
    return f"{report['tier']} ({report.get('way') or 'as it is'})"


def _of(report: Mapping[str, Any], endings: int) -> list[str]:
    if "error" in report:
        return [f"the suite ended without a report: {report['error']}"]
    found = []
    if report["survivors"]:
        found.append(f"{report['survivors']} processes were left")
    if not report["untouched"]:
        found.append("what lies outside was changed")
    if not report["available"]:
        if report["attacks"] or not report["refused"] or not report["reason"]:
            found.append("it is not available, and was not refused with a reason and a remedy")
        return found
    if not report["probed"]:
        found.append("it says that it is available without a probe")
    if report["tier"] not in _NO_WALLS:
        if report["attacks"] < LEAST_ATTACKS or report["families"] < LEAST_FAMILIES:
            found.append(f"only {report['attacks']} attacks of {report['families']} families")
        found += [f"the attack got through: {name}" for name in report["escaped"]]
        found += [f"the control failed: {name}" for name in report["controls_failed"]]
    return found + _of_endings(report["endings"], endings)


def _of_endings(found: Mapping[str, Any], wanted: int) -> list[str]:
    late = found["late_ms"]
    said = [f"a call that was killed: {what}" for what in found["wrong"]]
    # a few may not have begun in time on a machine that is busy
    if len(late) + found["unseen"] < wanted or len(late) < wanted * 0.75:
        said.append(f"only {len(late)} of {wanted} calls were seen at their deadline")
    elif late and (median := statistics.median(late)) > MOST_LATE_MS:
        said.append(f"half of the calls were there {median:g} ms after their deadline, or longer")
    if wanted and not found["killed"]:
        said.append("no call was killed")
    return said


def figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a suite in the end."""
    if "error" in report:
        return {key: report[key] for key in ("tier", "way", "error")}
    endings = report["endings"]
    late = sorted(endings["late_ms"])
    told = {key: report[key] for key in ("tier", "way", "user", "available", "enforcement", "attacks", "families", "survivors", "reason")}
    return {
        **told,
        "successes": len(report["escaped"]),
        "controls_failed": len(report["controls_failed"]),
        "late_ms_p50": round(statistics.median(late), 1) if late else None,
        "late_ms_max": late[-1] if late else None,
        "deadlines": len(late),
        "killed": endings["killed"],
    }
