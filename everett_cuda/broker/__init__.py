"""The broker: one process owns the devices and shares their conditioned bits among the processes of a machine."""

from .config import BrokerConfig
from .server import Broker, BrokerStats

__all__ = ["Broker", "BrokerConfig", "BrokerStats"]
