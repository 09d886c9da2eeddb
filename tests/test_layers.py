"""The arrows of the architecture, held against what the code imports.

The arrows: cli -> service -> server -> session -> engine -> backends.base, and
backends.swapdev -> blockdev.device. They only run down; nothing imports what stands above it.

This module must not import the code it looks at: it reads it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {
    "vswap": REPOSITORY / "client",
    "vswapd": REPOSITORY / "daemon",
    "vswapd_backends": REPOSITORY / "backends",
    "vswapd_blockdev": REPOSITORY / "blockdev",
}
OURS = frozenset(ROOTS)

# Which packages of ours a package may import at all, itself aside.
MAY_IMPORT = {
    "vswap": frozenset[str](),
    "vswapd": frozenset({"vswap", "vswapd_backends", "vswapd_blockdev"}),
    "vswapd_backends": frozenset({"vswap", "vswapd_blockdev"}),
    "vswapd_blockdev": frozenset[str](),
}

# The daemon's own floors, the highest first. A module may import from its own floor and from those
# below it. Modules that are not named form the engine, which is the lowest.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__", "demo"),
    ("cli",),
    ("service",),
    ("starting", "supervisor"),
    ("reception", "arbiter"),
    ("forking",),
    ("shard_process", "swap_devices"),
    ("front", "shard"),
    ("server", "steering", "listener", "watchdog"),
    ("connection",),
    ("session",),
    (
        "driver",
        "shrinker_thread",
        "status",
        "buffers",
        "arguments",
        "channel",
        "messages",
        "merge",
        "acceptor",
        "trouble",
        "compressor",
        "turns",
        "hello",
        "claims",
        "seats",
    ),
)
# What stands beside the floors: the operators' tool, and what configures, measures or logs. These
# may use what the engine says of itself and each other, and nothing of the engine may use them.
BESIDE = (
    "ctl",
    "causes",
    "config",
    "entry",
    "held_signals",
    "host",
    "free_memory",
    "metrics",
    "journal",
    "own_memory",
    "notify",
    "peer",
    "sizes",
    "stacks",
    "undumpable",
    "whole_file",
)

# What of the devices is contract or plain data; the other modules there are devices.
DEVICE_BORDER = frozenset(
    {"vswapd_blockdev.buffers", "vswapd_blockdev.device", "vswapd_blockdev.extents"}
)
# Who passes memory from process to process, whatever lies in it.
PROCESSES = frozenset({"vswapd.supervisor", "vswapd.shard_process"})
# What only pushes bytes and words around, and so may do no input or output of its own.
PURE = (
    "vswap.protocol",
    "vswapd.swap_table",
    "vswapd_backends.segment",
    "vswapd_blockdev.header",
    "vswapd_blockdev.extents",
)
DOES_IO = frozenset(
    {
        "asyncio",
        "fcntl",
        "io",
        "mmap",
        "os",
        "pathlib",
        "select",
        "selectors",
        "socket",
        "subprocess",
    }
)
TOOLS_ONLY = frozenset({"rich", "psutil", "shtab"})
TOOLS = ("vswapd.ctl", "vswapd.demo")


def _modules() -> dict[str, Path]:
    found = {}
    for package, root in ROOTS.items():
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _imports(name: str, *, run_time: bool = False) -> Iterator[str]:
    """Absolute names of the modules that `name` imports, wherever the import stands.

    With `run_time`, those that only type checkers see are left out.
    """
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    hidden = set()
    if run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")
                cut = node.level - (path.name == "__init__.py")
                base = ".".join([*package[: len(package) - cut], *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def _floor(module: str) -> int:
    """How high a module of the daemon stands, 0 being the highest; the engine is the lowest."""
    first = module.split(".")[1] if "." in module else ""
    for height, names in enumerate(FLOORS):
        if first in names:
            return height
    return len(FLOORS)


def _is_beside(module: str) -> bool:
    first = module.removeprefix("vswapd.").split(".")[0]
    return module.startswith("vswapd.") and (first in BESIDE or first.startswith("config_"))


def _is_engine(module: str) -> bool:
    return module.startswith("vswapd.") and _floor(module) == len(FLOORS) and not _is_beside(module)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_packages_import_only_what_lies_below(name: str) -> None:
    """client and blockdev import nothing of ours, backends never the daemon."""
    package = name.split(".", maxsplit=1)[0]
    allowed = MAY_IMPORT[package] | {package}
    imported = {module.split(".")[0] for module in _imports(name)} & OURS
    assert imported <= allowed, f"{name} imports {sorted(imported - allowed)}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("vswapd.")))
def test_floors_of_the_daemon(name: str) -> None:
    """Inside the daemon, no module imports one that stands above it."""
    for module in _imports(name):
        if not module.startswith("vswapd."):
            continue
        if _is_beside(name):
            assert _floor(module) >= len(FLOORS) - 1 or module.startswith("vswapd.demo"), (
                f"{name} stands beside the floors and imports {module}"
            )
        elif _is_engine(name):
            assert _is_engine(module) or module == "vswapd.sizes", (
                f"{name} is engine and imports {module}"
            )
        else:
            assert _is_beside(module) or _floor(module) >= _floor(name), (
                f"{name} imports {module}, which stands above it"
            )


def test_one_module_names_devices() -> None:
    """Which kinds of device there are only swap_devices.py knows; the rest has the contract."""
    concrete = {name for name in MODULES if name.startswith("vswapd_blockdev.")} - DEVICE_BORDER
    for name in MODULES:
        if name != "vswapd.swap_devices" and not name.startswith("vswapd_blockdev"):
            named = concrete & set(_imports(name))
            assert not named, f"{name} names {sorted(named)}"


def test_only_service_and_engine_name_backends() -> None:
    """Sessions, server and tools know pages and slots, not where the bytes of a slot live."""
    for name in MODULES:
        if not name.startswith("vswapd.") or name == "vswapd.service" or _is_engine(name):
            continue
        named = {m for m in _imports(name) if m.startswith("vswapd_backends.")}
        allowed = {"vswapd_backends.base"}
        if name in PROCESSES:
            allowed |= {
                "vswapd_backends.label",
                "vswapd_backends.shared",
                "vswapd_backends.shared_extents",
            }
        assert named <= allowed, f"{name} names {sorted(named)}"


@pytest.mark.parametrize("name", [name for name in PURE if name in MODULES])
def test_pure_modules_do_no_io(name: str) -> None:
    """Protocol, swap table, segment layout, header and extents import nothing that does I/O."""
    imported = {module.split(".")[0] for module in _imports(name, run_time=True)}
    assert not imported & DOES_IO, f"{name} imports {sorted(imported & DOES_IO)}"


def test_every_pure_module_exists() -> None:
    """The list of pure modules names modules that are there."""
    assert set(PURE) <= set(MODULES)


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith(TOOLS)))
def test_screens_and_process_lists_are_the_tools(name: str) -> None:
    """rich, psutil and shtab are imported by the operators' tools only."""
    imported = {module.split(".")[0] for module in _imports(name)}
    assert not imported & TOOLS_ONLY, f"{name} imports {sorted(imported & TOOLS_ONLY)}"


@pytest.mark.parametrize(
    "name", sorted(n for n in MODULES if not n.startswith((*TOOLS, "vswapd.cli")))
)
def test_library_code_does_not_print(name: str) -> None:
    """Library code logs; only the commands print."""
    calls = (
        node
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.Call)
    )
    lines = [
        call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert not lines, f"{name} prints in lines {lines}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_cancellation_is_lost(name: str) -> None:
    """Nobody waits by asyncio.wait_for, which on Python 3.11 may lose a cancellation.

    Who was told to end then goes on for ever; asyncio.timeout does not lose it.
    """
    calls = (n for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Call))
    lines = [call.lineno for call in calls if ast.unparse(call.func) == "asyncio.wait_for"]
    assert not lines, f"{name} waits so in lines {lines}"


@pytest.mark.parametrize("module", ["vswap", "vswap.protocol", "vswap.aio"])
def test_importing_the_client_leaves_the_daemon_out(module: str) -> None:
    """Importing the client loads no module of the daemon, its backends or devices, and no tool."""
    script = f"import {module}, sys; print(*sys.modules)"
    environment = {"PYTHONPATH": str(ROOTS["vswap"])}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert not loaded & ((OURS | TOOLS_ONLY | {"msgspec", "prometheus_client"}) - {"vswap"})


def test_no_module_imports_in_a_circle() -> None:
    """The imports of our modules, those for type checkers aside, have no cycle."""
    graph = {name: {m for m in _imports(name, run_time=True) if m in MODULES} for name in MODULES}
    while leaves := [name for name, below in graph.items() if not below - {name}]:
        for leaf in leaves:
            del graph[leaf]
        for below in graph.values():
            below.difference_update(leaves)
    assert not graph, f"circular imports among {sorted(graph)}"
