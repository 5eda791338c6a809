"""python -m services.context"""

from chassis import lifecycle
from services.context import wiring
from services.context.settings import ContextSettings

if __name__ == "__main__":
    lifecycle.run("context", ContextSettings.load, wiring.build)
