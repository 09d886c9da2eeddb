"""The daemon: zswap with a virtual swap layer, in userspace."""

__version__ = "0.1.0"
