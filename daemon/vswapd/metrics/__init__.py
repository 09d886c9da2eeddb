"""Metrics for Prometheus: over HTTP, and as a text file for node_exporter.

This package must not know the engine, only the STATUS document.
"""

from vswapd.metrics.exporter import Exporter
from vswapd.metrics.page import MetricsServer, check, start
from vswapd.metrics.textfile import TextfileWriter, write_textfile

__all__ = ["Exporter", "MetricsServer", "TextfileWriter", "check", "start", "write_textfile"]
