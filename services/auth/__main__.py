"""python -m services.auth"""

from chassis import lifecycle
from services.auth import wiring
from services.auth.settings import AuthSettings

lifecycle.run("auth", AuthSettings.load, wiring.build)
