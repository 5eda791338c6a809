"""python -m gateway."""

from chassis import lifecycle
from gateway import wiring
from gateway.settings import GatewaySettings

if __name__ == "__main__":
    lifecycle.run("gateway", GatewaySettings.load, wiring.build)
