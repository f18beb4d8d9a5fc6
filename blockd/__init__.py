"""blockd: the processes and the ways to reach them."""

__version__ = "0.1.0"
