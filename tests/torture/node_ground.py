"""stub"""

from __future__ import annotations
from tests.torture.faults import Fault
from tests.torture.ground import Ground

NODE_FAULTS: tuple[Fault, ...] = ()


class NodeGround(Ground):
    pass
