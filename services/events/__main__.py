"""python -m services.events"""

from chassis import lifecycle
from services.events import settings, wiring

if __name__ == "__main__":
    lifecycle.run("events", settings.EventsSettings.load, wiring.build)
