"""What `netra` can do on the machine the stack runs on: `netra token` and `netra doctor`."""

import asyncio
import sys

from standalone import doctor as examination
from standalone import folder, login
from standalone.errors import StandaloneError
from standalone.progress import complain


def token(user: str = login.DEVELOPER, role: str = "user", tier: str = "internal") -> None:
    """Print one access token of a development user, made first if need be, and nothing else."""
    try:
        sys.stdout.write(asyncio.run(login.access_token(folder.default(), user, role, tier)) + "\n")
    except StandaloneError as error:
        complain(str(error))
        raise SystemExit(1) from None


def doctor() -> None:
    """Look at this machine and at the running stack; each problem is told with its remedy."""
    problems = 0
    for finding in examination.examine(folder.default()):
        problems += bool(finding.remedy)
        sys.stdout.write(f"{'problem' if finding.remedy else 'ok     '}  {finding.text}\n")
        if finding.remedy:
            sys.stdout.write(f"         remedy: {finding.remedy}\n")
    if problems:
        raise SystemExit(1)
