"""python -m services.dispatcher"""

from chassis import lifecycle
from services.dispatcher import settings, wiring

lifecycle.run("dispatcher", settings.DispatcherSettings.load, wiring.build)
