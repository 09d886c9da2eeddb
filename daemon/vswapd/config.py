"""The configuration: a TOML file, then `--set KEY=VALUE`, then what is set at run time.

All three go the same way: a dotted key and a value, checked by the schema, put into a Config.

Invariants:
- A Config that exists is valid: every value by itself, and all of them together.
- A key that is not known is refused, and the nearest known one is named.
- A ConfigError is one line: where it stands, the dotted key, what is wrong, what to do.

This module must not know the engine, only the plain values that it takes (`settings`).
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final

import msgspec
from msgspec import UNSET

from vswapd import config_checks
from vswapd.config_budget import Budget, Fitting
from vswapd.config_schema import (
    DEFAULT_GROUP,
    SECTIONS,
    Device,
    GroupKeys,
    Keys,
    Log,
    Metrics,
    Pool,
    Server,
    ShrinkerKeys,
    Store,
    Table,
    field_names,
    read_value,
    text_of,
)
from vswapd.host import Host
from vswapd.settings import GroupLimits, Settings
from vswapd.sizes import UnitError, human_size

DEFAULT: Final = "default"
"""The group whose limits hold where a group says nothing of its own."""
FIXED_SECTIONS: Final = frozenset({"server", "table"})
KEYS: Final[tuple[str, ...]] = tuple(
    f"{section}.{name}" for section, table in SECTIONS.items() for name in field_names(table)
)
"""Every dotted key of a fixed name."""
GROUP_KEYS: Final[tuple[str, ...]] = tuple(f"groups.*.{name}" for name in field_names(GroupKeys))
"""The dotted keys of groups, `*` standing for the group's name."""
RELOADABLE: Final[frozenset[str]] = frozenset(
    key
    for key in (*KEYS, *GROUP_KEYS)
    if key.partition(".")[0] not in FIXED_SECTIONS and key != "pool.lock_memory"
)
"""Keys that can change while the daemon runs; ask `reloadable(key)` for keys with group names."""
OF_MEMORY: Final = ("server.shards", "table.max_slots")
"""Keys that decide how memory is made: they hold for as long as it is there, whoever serves it."""

_SHARD_POOL: Final = 64 << 20
"""Pool that makes another shard worth its process, where their number is `auto`."""
_MOST_AUTO: Final = 16
_RESERVE_SHARE: Final = 0.05
"""Of the memory that the daemon may use, where pool.reserve is `auto`."""
_MOST_BYTES: Final = 1 << 20
"""Of a file: hundreds of times what every key with its comment takes."""


_MOST_DIGITS: Final = 10
"""Of a uid; longer numbers are nobody's."""


class ConfigError(Exception):
    """The configuration cannot be used. One line of text; exit code EX_CONFIG of sysexits.h."""

    exit_code: ClassVar[int] = 78

    def __init__(self, text: str, *, key: str = "", source: str = "") -> None:
        super().__init__(": ".join(part for part in (source, key, text) if part))
        self.key = key
        self.source = source


def reloadable(key: str) -> bool:
    """Whether the value of a dotted key can change while the daemon runs."""
    if key.startswith("groups."):
        key = f"groups.*.{key.rpartition('.')[2]}"
    return key in RELOADABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMemory:
    """What memory that outlives the process is, whatever the keys in OF_MEMORY come to now."""

    shards: int
    max_slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that can be configured; the fields are the tables of the file."""

    server: Server = field(default_factory=Server)
    table: Table = field(default_factory=Table)
    pool: Pool = field(default_factory=Pool)
    store: Store = field(default_factory=Store)
    shrinker: ShrinkerKeys = field(default_factory=ShrinkerKeys)
    devices: tuple[Device, ...] = ()
    groups: Mapping[str, GroupKeys] = field(
        default_factory=lambda: MappingProxyType({DEFAULT: DEFAULT_GROUP})
    )
    """By name: a user's name, a uid in decimal, or `default`, which is always there."""
    metrics: Metrics = field(default_factory=Metrics)
    log: Log = field(default_factory=Log)
    kept: KeptMemory | None = None
    """Memory that outlives the process; None: there is none, it is made as the tables say."""

    def with_override(self, key: str, text: str) -> Config:
        """This configuration with one key set from text, as `vswapctl set` does.

        Raises:
            ConfigError: no such key, no such value, or one that does not fit the others.
        """
        if key.partition(".")[0].partition("[")[0] == "device":
            raise ConfigError(
                "devices are put into use with `vswapctl swapon PATH`, out of it with "
                "`vswapctl swapoff PATH`",
                key=key,
            )
        changed = _assign(self, key, text, from_text=True, source="")
        return _checked(changed, {key: ""}, "")

    def get(self, key: str) -> str:
        """The value of one dotted key, as text.

        Raises:
            ConfigError: no such key.
        """
        flat = self.flat()
        if key not in flat:
            raise _unknown(key, "")
        return flat[key]

    def flat(self) -> dict[str, str]:
        """Every dotted key and its value, as text that `with_override` would take."""
        return {key: text_of(value) for key, value in _items(self)}

    @classmethod
    def from_flat(cls, flat: Mapping[str, str]) -> tuple[Config, list[ConfigError]]:
        """What `flat` was made of; and what of it is not understood, and was left out.

        The values are not checked against each other: they have been, perhaps by another version.
        """
        config = cls()
        left_out: list[ConfigError] = []
        devices: dict[str, dict[str, str]] = {}
        for key, text in flat.items():
            where, _, name = key.rpartition(".")
            if where.startswith("device["):
                devices.setdefault(where, {})[name] = text
                continue
            try:
                config = _assign(config, key, text, from_text=True, source="")
            except ConfigError as error:
                left_out.append(error)
        for where, fields in devices.items():
            try:
                device = _device(fields, where, from_text=True, source="")
            except ConfigError as error:
                left_out.append(error)
            else:
                config = dataclasses.replace(config, devices=(*config.devices, device))
        return config, left_out

    def without(self, key: str) -> Config:
        """This configuration with one key, or one group, back at its default.

        Args:
            key: as a ConfigError has it. Of one that is not to be found all is left out.
        """
        section, _, name = key.partition(".")
        if section in SECTIONS and name in field_names(SECTIONS[section]):
            table = getattr(self, section)
            default = getattr(SECTIONS[section](), name)
            changed = msgspec.structs.replace(table, **{name: default})
            return dataclasses.replace(self, **{section: changed})
        if section == "groups":
            group = name if name in self.groups else name.rpartition(".")[0]
            others = {each: keys for each, keys in self.groups.items() if each != group}
            return dataclasses.replace(
                self, groups=MappingProxyType({DEFAULT: DEFAULT_GROUP, **others})
            )
        return Config(kept=self.kept)

    def over(self, kept: KeptMemory, made_with: Mapping[str, str]) -> Config:
        """This configuration over memory that outlives the process.

        Args:
            kept: what the memory is.
            made_with: the keys of OF_MEMORY, as they were when it was made.
        """
        config = self
        for key in OF_MEMORY:
            config = _assign(config, key, made_with[key], from_text=True, source="")
        return dataclasses.replace(config, kept=kept)

    def fixed_changes(self, new: Config) -> tuple[str, ...]:
        """The keys that differ in `new` but cannot be changed before a restart, sorted."""
        old, other = self.flat(), new.flat()
        return tuple(
            sorted(
                key
                for key in old.keys() | other.keys()
                if not reloadable(key) and old.get(key) != other.get(key)
            )
        )

    def reloaded(self, new: Config) -> Config:
        """What holds after a reload of `new`: its values where they can change, else ours.

        Raises:
            ConfigError: the mixture of old and new values does not fit together.
        """
        mixed = dataclasses.replace(
            new,
            server=self.server,
            table=self.table,
            kept=self.kept,
            devices=self.devices,
            pool=msgspec.structs.replace(new.pool, lock_memory=self.pool.lock_memory),
        )
        return _checked(mixed, {}, "")

    def settings(self, host: Host) -> Settings:
        """What the engine is told: sizes in bytes on this host, groups by uid.

        Raises:
            ConfigError: more memory than the host has, or a user or group that it does not know.
        """
        if self.server.socket_group and host.gid_of(self.server.socket_group) is None:
            raise ConfigError(
                f"this host has no group {self.server.socket_group!r}: write a group's name",
                key="server.socket_group",
            )
        pool_max = self.pool.max.of(host.ram_bytes)
        if pool_max > host.ram_bytes:
            raise ConfigError(
                f"{self.pool.max} is more than the {human_size(host.ram_bytes)} of memory that "
                "this process may use: write less, or a percentage such as 20%",
                key="pool.max",
            )
        default = self.groups[DEFAULT]
        groups: dict[str, GroupLimits] = {}
        for name, keys in self.groups.items():
            if name == DEFAULT:
                continue
            uid = _uid_text(name, host)
            if uid in groups:
                raise ConfigError(
                    f"uid {uid} has two tables, by name and by number: keep one of them",
                    key=f"groups.{name}",
                )
            groups[uid] = _limits(keys, default, pool_max)
        return Settings(
            max_slots=self.table.max_slots if self.kept is None else self.kept.max_slots,
            pool_max=pool_max,
            pool_reserve=self._reserve(host),
            accept_threshold=float(self.pool.accept_threshold),
            codec=self.pool.tiers.first,
            dense=self.pool.tiers.dense,
            dense_age=float(self.pool.dense_age),
            recompress_share=float(self.shrinker.recompress_cpu),
            pool_enabled=self.pool.enabled,
            verify=self.pool.verify,
            store_enabled=self.store.enabled,
            shrinker_enabled=self.shrinker.enabled,
            high_watermark=float(self.shrinker.high_watermark),
            low_watermark=float(self.shrinker.low_watermark),
            shrinker_rate=int(self.shrinker.rate),
            idle_age=float(self.shrinker.idle_age),
            write_budget=int(self.shrinker.write_budget),
            groups=MappingProxyType(groups),
            default_group=_limits(default, default, pool_max),
        )

    def _reserve(self, host: Host) -> int:
        """pool.reserve in bytes; by itself enough for all that the processes may come to take."""
        if not self.pool.reserve.automatic:
            return self.pool.reserve.of(host.ram_bytes)
        return max(int(_RESERVE_SHARE * host.ram_bytes), self.budget(host).growth)

    def fitting(self, host: Host, own_bytes: int) -> Fitting:
        """How far pool.max fits, where the processes take so many bytes by themselves."""
        settings = self.settings(host)
        return Fitting(
            pool_max=settings.pool_max,
            ram_bytes=host.ram_bytes,
            own_bytes=own_bytes,
            reserve=settings.pool_reserve,
            automatic=self.pool.reserve.automatic,
        )

    def budget(self, host: Host) -> Budget:
        """What the processes may take beside the pool, on a host with so much memory."""
        return Budget.of(self.server, host.ram_bytes, self.shards(host))

    def shards(self, host: Host) -> int:
        """How many shards there are to be: server.shards, or one per core that has enough to do."""
        if self.kept is not None:
            return self.kept.shards
        if self.server.shards:
            return int(self.server.shards)
        pool_max = self.pool.max.of(host.ram_bytes)
        return max(1, min(host.cpus, pool_max // _SHARD_POOL, _MOST_AUTO))

    def socket_path(self, host: Host) -> str:
        """Where to listen: server.socket, else the default of this user."""
        return self.server.socket or host.socket_path


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file and of `--set` texts on top of it.

    Args:
        path: the TOML file; None: nothing but the defaults.
        overrides: `KEY=VALUE` each; `device=PATH[,size=S][,priority=N][,encrypt=BOOL]` adds one.

    Raises:
        ConfigError: the file cannot be read or is no TOML, or something in it is not right.
    """
    config = Config()
    sources: dict[str, str] = {}
    if path is not None:
        for key, raw in _walk(_document(path), str(path)):
            config = _assign(config, key, raw, from_text=False, source=str(path))
            sources[key] = str(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        source = f"--set {override}"
        key = key.strip()
        if not equals:
            raise ConfigError("write it as KEY=VALUE, such as pool.max=512M", source=source)
        if key == "device":
            device = _device(_device_fields(text, source), "device", from_text=True, source=source)
            config = dataclasses.replace(config, devices=(*config.devices, device))
        else:
            config = _assign(config, key, text.strip(), from_text=True, source=source)
        sources[key] = source
    return _checked(config, sources, "" if path is None else str(path))


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_content(path).decode())
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"cannot be read: {why}", source=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 text (byte {error.start}): save it as UTF-8", source=str(path)
        ) from None
    except RecursionError:
        text = "is not valid TOML: its arrays or tables are too deep"
        raise ConfigError(text, source=str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML: {error}", source=str(path)) from None
    except ValueError:
        text = "is not valid TOML: a number in it has thousands of digits"
        raise ConfigError(text, source=str(path)) from None


def _content(path: Path) -> bytes:
    """What a file holds; anything that could keep us waiting for it is refused.

    Raises:
        OSError, ConfigError: it cannot be read, or is no configuration.
    """
    if not (path.is_file() or path == Path(os.devnull)):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists():
            raise ConfigError(
                "is no regular file: write the configuration to one", source=str(path)
            )
    with open(path, "rb", opener=_at_once) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"is longer than {human_size(_MOST_BYTES)}", source=str(path))
    return content


def _at_once(path: str, flags: int) -> int:
    """Open, and do not wait: it may have become something else since we looked."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _walk(document: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and raw values of a document, in its order; a device is one value."""
    for section, content in document.items():
        if section == "device":
            if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
                raise ConfigError("devices are written as [[device]]", key=section, source=source)
            yield from (("device", item) for item in content)
        elif section != "groups" and section not in SECTIONS:
            raise _unknown(section, source)
        elif not isinstance(content, dict):
            raise ConfigError(f"is a table: write [{section}]", key=section, source=source)
        elif section == "groups":
            for name, keys in content.items():
                if not isinstance(keys, dict):
                    text = "limits are of a group: write [groups.default] or [groups.NAME]"
                    raise ConfigError(text, key=f"groups.{name}", source=source)
                yield from ((f"groups.{name}.{key}", raw) for key, raw in keys.items())
        else:
            yield from ((f"{section}.{key}", raw) for key, raw in content.items())


def _assign(config: Config, key: str, raw: object, *, from_text: bool, source: str) -> Config:
    """The configuration with one key set; not checked against the others yet."""
    section, _, name = key.partition(".")
    if section == "device" and isinstance(raw, dict):
        where = f"device[{len(config.devices)}]"
        device = _device(raw, where, from_text=from_text, source=source)
        return dataclasses.replace(config, devices=(*config.devices, device))
    table: type[Keys] | None = SECTIONS.get(section)
    if section == "groups":
        group, _, name = name.rpartition(".")
        table = GroupKeys if group else None
    if table is None or name not in field_names(table):
        raise _unknown(key, source)
    try:
        value = read_value(table, name, raw, from_text=from_text)
    except UnitError as error:
        raise ConfigError(str(error), key=key, source=source) from None
    if section != "groups":
        changed = msgspec.structs.replace(getattr(config, section), **{name: value})
        return dataclasses.replace(config, **{section: changed})
    keys = msgspec.structs.replace(config.groups.get(group, GroupKeys()), **{name: value})
    return dataclasses.replace(config, groups=MappingProxyType({**config.groups, group: keys}))


def _device_fields(text: str, source: str) -> dict[str, str]:
    """PATH[,size=S][,priority=N][,encrypt=BOOL] as the keys of one device."""
    path, *options = text.split(",")
    fields = {"path": path.strip()}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            hint = "write device=PATH[,size=512M][,priority=1][,encrypt=true]"
            raise ConfigError(f"{option!r} is no option: {hint}", key="device", source=source)
        if name.strip() in fields:
            text = f"{name.strip()} is given twice: which is meant?"
            raise ConfigError(text, key=f"device.{name.strip()}", source=source)
        fields[name.strip()] = value.strip()
    return fields


def _device(raw: Mapping[str, object], where: str, *, from_text: bool, source: str) -> Device:
    values = {}
    for name, value in raw.items():
        if name not in field_names(Device):
            raise _unknown(f"{where}.{name}", source, [f"{where}.{n}" for n in field_names(Device)])
        try:
            values[name] = read_value(Device, name, value, from_text=from_text)
        except UnitError as error:
            raise ConfigError(str(error), key=f"{where}.{name}", source=source) from None
    if not values.get("path"):
        raise ConfigError("a device needs a path", key=f"{where}.path", source=source)
    return Device(**values)


def _unknown(key: str, source: str, known: Sequence[str] = ()) -> ConfigError:
    """The error for a key that does not exist; it names the nearest one that does."""
    section, _, name = key.partition(".")
    if not known:
        group = name.rpartition(".")[0] or DEFAULT
        names = [f"groups.{group}.{n}" for n in field_names(GroupKeys)]
        tables = [*SECTIONS, "groups", "device"]
        if key in tables:
            example = next(k for k in (*KEYS, *names) if k.startswith(f"{key}."))
            text = f"is a table: name a key of it, such as {example}"
            return ConfigError(text, key=key, source=source)
        known = [*KEYS, *names] if name else [*tables, *KEYS]
    # First the right name in the wrong table, or in none; then what is spelt most alike.
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near if len(near) == 1 else difflib.get_close_matches(key, known, n=1)
    if near:
        hint = f"did you mean {near[0]}?"
    else:
        same = [k for k in known if k.partition(".")[0] == section] or [*SECTIONS, "groups"]
        hint = f"known here: {', '.join(same)}"
    return ConfigError(f"there is no such key; {hint}", key=key, source=source)


def _items(config: Config) -> Iterator[tuple[str, object]]:
    """Every key and value; keys that a group or device leaves open are left out."""
    for section in SECTIONS:
        table = getattr(config, section)
        yield from ((f"{section}.{n}", getattr(table, n)) for n in field_names(type(table)))
    tables = [(f"device[{index}]", device) for index, device in enumerate(config.devices)]
    rows = [*tables, *((f"groups.{name}", keys) for name, keys in config.groups.items())]
    for where, row in rows:
        for name in field_names(type(row)):
            if (value := getattr(row, name)) is not UNSET and value is not None:
                yield f"{where}.{name}", value


def _checked(config: Config, sources: Mapping[str, str], fallback: str) -> Config:
    """The configuration, if its values fit together.

    Args:
        config: what is to be checked.
        sources: where each key was set, for the error.
        fallback: what to name as the place of a key that was set nowhere.
    """
    for found in config_checks.problems(config):
        source = next((sources[key] for key in found.keys if key in sources), fallback)
        raise ConfigError(found.text, key=found.keys[0], source=source)
    return config


def _uid_text(group: str, host: Host) -> str:
    """The group name that the engine knows: the uid in decimal."""
    if group.isascii() and group.isdigit() and len(group) <= _MOST_DIGITS:
        return str(int(group))
    uid = host.uid_of(group)
    if uid is None:
        raise ConfigError(
            "this host has no user of that name: write a user's name or a uid",
            key=f"groups.{group}",
        )
    return str(uid)


def _limits(keys: GroupKeys, default: GroupKeys, pool_max: int) -> GroupLimits:
    """Limits of a group, in bytes; what it leaves open is as in the default group."""
    pool = default.pool_max if keys.pool_max is UNSET else keys.pool_max
    device = default.device_max if keys.device_max is UNSET else keys.device_max
    writeback = default.writeback if keys.writeback is UNSET else keys.writeback
    assert pool is not UNSET
    assert device is not UNSET
    assert writeback is not UNSET
    return GroupLimits(
        pool_max=None if pool.unlimited else pool.of(pool_max),
        device_max=None if device.unlimited else device.of(0),
        writeback=writeback,
    )
