"""The installed service is upgraded from the version that CI passed last, under a real systemd."""

from __future__ import annotations

import pytest

from support.container import Container, missing
from support.installed import Journal, client, restarted, status
from support.versions import PREVIOUS, sources_of

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

_INSTALL = "make -C /{} install PYTHON=/usr/bin/python3 && systemctl daemon-reload"
_WHEELS = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
_LIVES = f"""
import os, random, subprocess, vswap
page = vswap.PAGE_BYTES
pages = b"".join(
    (bytes(page), os.urandom(page), random.randbytes(64) * (page // 64))[n % 3] for n in range(3000)
)
with vswap.connect() as space:
    slots = space.store(pages)
    subprocess.run([*"vswapctl swapon --size 64M /var/lib/vswapd/upgraded".split()], check=True)
    subprocess.run([*"vswapctl writeback 4M".split()], check=True)
    upgrade = {_INSTALL.format("src")!r} + " && systemctl restart vswapd.service"
    subprocess.run(["sh", "-c", upgrade], check=True, stdout=subprocess.DEVNULL)
    for _ in range(2):
        assert bytes(space.load(slots)) == pages
        space.store(pages, slots=slots)
        subprocess.run(["systemctl", "restart", "vswapd.service"], check=True)
    subprocess.run([*"vswapctl swapoff /var/lib/vswapd/upgraded".split()], check=True)
    assert bytes(space.load(slots)) == pages
    space.free(slots)
    print("kept", len(slots))
"""
"""A client of the previous version whose daemon is replaced, with everything that is installed."""


def test_a_live_service_is_upgraded(machine: Container) -> None:
    """`make install` over the running one, and a restart: its client goes on, with all pages."""
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    sources_of(PREVIOUS, machine.root / "before")
    try:
        configuration.write_text("[server]\nshards = 2\n")
        machine.run("systemctl", "stop", "vswapd.service")
        machine.run("sh", "-c", _INSTALL.format("before"), environment=_WHEELS)
        restarted(machine)
        assert status(machine)["shards"] == 2
        journal = Journal(machine)
        result = client(machine, _LIVES, "root")
        assert result.stdout.endswith("kept 3000\n"), result.stderr
        assert [entry for entry in journal.entries() if int(entry["PRIORITY"]) <= 4] == []
    finally:
        configuration.write_text(before)
        machine.run("sh", "-c", _INSTALL.format("src"), environment=_WHEELS)
        machine.run("systemctl", "stop", "vswapd.service")
        restarted(machine)
