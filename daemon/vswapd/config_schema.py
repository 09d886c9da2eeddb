"""The keys of the configuration: names, types, bounds and defaults. One struct per table.

What a key means to an operator stands in systemd/vswapd.toml and docs/configuration.md; tests hold
that every key here is in both, with the default written here.

Invariants:
- Every value can be written as text (`text_of`) and read back from that text to the same value.
- Types that TOML has no word for (sizes, shares, codecs) know their grammar: `parse` and `str`.

This module must not know files, hosts, or the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Protocol, runtime_checkable

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from vswapd import sizes
from vswapd.sizes import UnitError


@runtime_checkable
class _Value(Protocol):
    """A type of value with a grammar of its own."""

    @classmethod
    def parse(cls, raw: object) -> object: ...


def _text(raw: object, hint: str) -> str | int:
    """What a grammar can be tried on: text, or a whole number."""
    if isinstance(raw, bool) or not isinstance(raw, str | int):
        raise UnitError(f"{_shown(raw)} is not understood: {hint}")
    return raw


class Size(int):
    """Bytes, written as a size."""

    @classmethod
    def parse(cls, raw: object) -> Size:
        """See sizes.parse_size."""
        return cls(sizes.parse_size(_text(raw, sizes.SIZE_HINT)))

    def __str__(self) -> str:
        return sizes.format_size(int(self))


class Rate(Size):
    """Bytes per second."""

    @classmethod
    def parse(cls, raw: object) -> Rate:
        """See sizes.parse_rate."""
        return cls(sizes.parse_rate(_text(raw, "write a size per second, such as 50M/s")))


class Share(float):
    """A part of a whole, 0 to 1, written as a percentage."""

    @classmethod
    def parse(cls, raw: object) -> Share:
        """See sizes.parse_share."""
        return cls(sizes.parse_share(str(_text(raw, sizes.SHARE_HINT))))

    def __str__(self) -> str:
        return sizes.format_share(float(self))


class Seconds(float):
    """A length of time."""

    @classmethod
    def parse(cls, raw: object) -> Seconds:
        """See sizes.parse_duration."""
        return cls(sizes.parse_duration(_text(raw, sizes.DURATION_HINT)))

    def __str__(self) -> str:
        return sizes.format_duration(float(self))


class Mode(int):
    """Permissions of a file, written in octal."""

    @classmethod
    def parse(cls, raw: object) -> Mode:
        """Permissions such as "0660".

        Raises:
            UnitError: not octal text, or more than nine bits.
        """
        hint = 'write octal text such as "0660"'
        if not isinstance(raw, str) or not re.fullmatch("0?[0-7]{3}", raw):
            raise UnitError(f"{_shown(raw)} is no file mode: {hint}")
        return cls(int(raw, 8))

    def __str__(self) -> str:
        return f"{int(self):04o}"


class Amount:
    """A size, or a share of something; `of` says how much that is."""

    __slots__ = ("share", "size")
    hint = f"{sizes.SIZE_HINT}, or a percentage such as 20%"

    def __init__(self, *, size: int | None = None, share: float | None = None) -> None:
        self.size: Final = size
        self.share: Final = share

    @classmethod
    def parse(cls, raw: object) -> Amount:
        """A size or a share."""
        text = _text(raw, cls.hint)
        if isinstance(text, str) and "%" in text:
            return cls(share=sizes.parse_share(text))
        try:
            return cls(size=sizes.parse_size(text))
        except UnitError as error:
            raise UnitError(f"{error}, or a percentage such as 20%") from None

    def of(self, whole: int) -> int:
        """Bytes, `whole` being what shares are taken of."""
        return int((self.share or 0.0) * whole) if self.size is None else self.size

    def __str__(self) -> str:
        return (
            sizes.format_size(self.size or 0)
            if self.share is None
            else sizes.format_share(self.share)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Amount):
            return NotImplemented
        return (type(self), self.size, self.share) == (type(other), other.size, other.share)

    def __hash__(self) -> int:
        return hash((self.size, self.share))


class Reserve(Amount):
    """An amount, or `auto`."""

    __slots__ = ()

    @classmethod
    def parse(cls, raw: object) -> Reserve:
        """A size, a share, or "auto"."""
        if raw == "auto":
            return cls()
        try:
            found = Amount.parse(raw)
        except UnitError as error:
            raise UnitError(f'{error}, or "auto"') from None
        return cls(size=found.size, share=found.share)

    @property
    def automatic(self) -> bool:
        """Whether it is for the daemon to say how much."""
        return self.size is None and self.share is None

    def __str__(self) -> str:
        return "auto" if self.automatic else super().__str__()


class Limit(Amount):
    """An amount, or `none` for no limit."""

    __slots__ = ()

    @classmethod
    def parse(cls, raw: object) -> Limit:
        """A size, a share, or "none"."""
        if raw == "none":
            return cls()
        try:
            found = Amount.parse(raw)
        except UnitError as error:
            raise UnitError(f'{error}, or "none"') from None
        return cls(size=found.size, share=found.share)

    @property
    def unlimited(self) -> bool:
        """Whether this is no limit at all."""
        return self.size is None and self.share is None

    def __str__(self) -> str:
        return "none" if self.unlimited else super().__str__()


class SizeLimit(Limit):
    """A size, or `none` for no limit; there is no whole to take a share of."""

    __slots__ = ()

    @classmethod
    def parse(cls, raw: object) -> SizeLimit:
        """A size or "none"."""
        if raw == "none":
            return cls()
        try:
            return cls(size=Size.parse(raw))
        except UnitError as error:
            raise UnitError(f'{error}, or "none"') from None


class Shards(int):
    """A number of shards; 0, written `auto`: as many as there are cores for."""

    most: Final = 64

    @classmethod
    def parse(cls, raw: object) -> Shards:
        """A number, or "auto".

        Raises:
            UnitError: neither.
        """
        if raw == "auto":
            return cls(0)
        try:
            number = int(raw) if isinstance(raw, int | str) and not isinstance(raw, bool) else 0
        except ValueError:
            number = 0
        if not 1 <= number <= cls.most:
            raise UnitError(f'{_shown(raw)}: write "auto", or a whole number, 1 to {cls.most}')
        return cls(number)

    def __str__(self) -> str:
        return str(int(self)) if self else "auto"


class CodecSpec(str):
    """The name of a codec: lz4, lz4hc:1 to lz4hc:12, zstd:1 to zstd:22."""

    __slots__ = ()
    levels: Final = {"lz4hc": 12, "zstd": 22}

    @classmethod
    def parse(cls, raw: object) -> CodecSpec:
        """A codec's name, by its grammar.

        Raises:
            UnitError: it names no codec.
        """
        if raw == "lz4":
            return cls("lz4")
        if isinstance(raw, str) and (found := re.fullmatch("(lz4hc|zstd):([1-9][0-9]?)", raw)):
            if int(found[2]) <= cls.levels[found[1]]:
                return cls(raw)
            raise UnitError(f"{_shown(raw)}: levels of {found[1]} are 1 to {cls.levels[found[1]]}")
        raise UnitError(
            f"{_shown(raw)} is no codec: use lz4, lz4hc:1 to lz4hc:12, or zstd:1 to zstd:22"
        )


class Tiers(str):
    """One codec or two: for new pages, and for pages that got old. As text `lz4,zstd:3`."""

    __slots__ = ()

    @classmethod
    def parse(cls, raw: object) -> Tiers:
        """A list of codecs, or text with a comma between them.

        Raises:
            UnitError: not one or two different codecs.
        """
        names = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(names, list) or not 1 <= len(names) <= cls.most:
            raise UnitError(
                f'{_shown(raw)}: write one codec or two, such as ["lz4", "zstd:3"]: for new '
                "pages, and for pages that got old"
            )
        codecs = [
            CodecSpec.parse(name.strip() if isinstance(name, str) else name) for name in names
        ]
        if len(set(codecs)) < len(codecs):
            raise UnitError(
                f"{_shown(raw)}: the second codec is for pages that got old: another one"
            )
        return cls(",".join(codecs))

    most: Final = 2

    @property
    def first(self) -> str:
        """For new pages."""
        return self.partition(",")[0]

    @property
    def dense(self) -> str:
        """For pages that got old; empty: there is none."""
        return self.partition(",")[2]


class Locking(str):
    """Whether memory is locked into RAM: `no`, `try`, or `must`."""

    __slots__ = ()
    former: Final = {"false": "no", "true": "must"}
    """How older configurations say it."""

    @classmethod
    def parse(cls, raw: object) -> Locking:
        """One of the three words, or a boolean.

        Raises:
            UnitError: it is none.
        """
        text = str(raw).lower() if isinstance(raw, bool) else raw
        text = cls.former.get(text, text) if isinstance(text, str) else text
        if text not in {"no", "try", "must"}:
            raise UnitError(f"{raw!r}: write no, try or must")
        return cls(text)


class Keys(Struct, frozen=True, forbid_unknown_fields=True):
    """One table of the configuration."""


class Server(Keys, frozen=True, kw_only=True):
    """[server]: the socket, and what bounds its clients."""

    socket: str = ""
    socket_mode: Mode = Mode(0o600)
    socket_group: str = ""
    max_connections: Annotated[int, Meta(ge=1, le=65536)] = 64
    max_user_connections: Annotated[int, Meta(ge=1, le=65536)] = 48
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 4096
    max_pipeline: Annotated[int, Meta(ge=1, le=1024)] = 16
    buffer_memory: Size = Size(256 << 20)
    window: Size = Size(4 << 20)
    request_timeout: Seconds = Seconds(30)
    resume_timeout: Seconds = Seconds(60)
    max_named_spaces: Annotated[int, Meta(ge=0, le=4096)] = 64
    shards: Shards = Shards(0)


class Table(Keys, frozen=True, kw_only=True):
    """[table]: the swap table."""

    max_slots: Annotated[int, Meta(ge=512, le=1 << 36)] = 1 << 30


class Pool(Keys, frozen=True, kw_only=True):
    """[pool]: compressed pages in memory."""

    max: Amount = Amount(share=0.20)
    reserve: Reserve = Reserve()
    accept_threshold: Share = Share(0.90)
    tiers: Tiers = Tiers("lz4,zstd:3")
    dense_age: Seconds = Seconds(60)
    enabled: bool = True
    verify: Literal["never", "always"] = "never"
    lock_memory: Locking = Locking("no")


class Store(Keys, frozen=True, kw_only=True):
    """[store]: whether pages are taken at all."""

    enabled: bool = True


class ShrinkerKeys(Keys, frozen=True, kw_only=True):
    """[shrinker]: what moves from memory to devices, and when."""

    enabled: bool = True
    high_watermark: Share = Share(0.95)
    low_watermark: Share = Share(0.85)
    recompress_cpu: Share = Share(0.25)
    rate: Rate = Rate(0)
    idle_age: Seconds = Seconds(0)
    write_budget: Size = Size(0)


class Device(Keys, frozen=True, kw_only=True):
    """[[device]]: one swap device."""

    path: str
    size: Size | None = None
    priority: Annotated[int, Meta(ge=0, le=32767)] = 0
    encrypt: bool = True


class GroupKeys(Keys, frozen=True, kw_only=True):
    """[groups.NAME]: limits of one group; what is not said is taken from groups.default."""

    pool_max: Limit | UnsetType = UNSET
    device_max: SizeLimit | UnsetType = UNSET
    writeback: bool | UnsetType = UNSET


DEFAULT_GROUP: Final = GroupKeys(pool_max=Limit(), device_max=SizeLimit(), writeback=True)


class Metrics(Keys, frozen=True, kw_only=True):
    """[metrics]: counters for Prometheus."""

    listen: str = ""
    textfile: str = ""


class Log(Keys, frozen=True, kw_only=True):
    """[log]: what goes to the journal."""

    level: Literal["debug", "info", "warning", "error"] = "info"


SECTIONS: Final[Mapping[str, type[Keys]]] = MappingProxyType(
    {
        "server": Server,
        "table": Table,
        "pool": Pool,
        "store": Store,
        "shrinker": ShrinkerKeys,
        "metrics": Metrics,
        "log": Log,
    }
)
"""The tables of fixed names; `device` and `groups` have entries of the operator's making."""

_ALL: Final[tuple[type[Keys], ...]] = (*SECTIONS.values(), Device, GroupKeys)
_TYPES: Final[Mapping[type[Keys], Mapping[str, Any]]] = {
    table: {field.name: field.type for field in msgspec.structs.fields(table)} for table in _ALL
}


def field_names(table: type[Keys]) -> tuple[str, ...]:
    """The keys of a table, in the order in which they are documented."""
    return tuple(_TYPES[table])


def read_value(table: type[Keys], name: str, raw: object, *, from_text: bool) -> Any:
    """The value of one key, checked against its type and bounds.

    Args:
        table: whose key it is; `name` must be one of `field_names(table)`.
        name: the key.
        raw: what TOML gave, or text if `from_text`, where `64` and `true` are text too.
        from_text: whether numbers and booleans are to be read out of text.

    Raises:
        UnitError: not such a value; the text says what would be one.
    """
    kind = _TYPES[table][name]
    if isinstance(raw, str) and not _can_be_named(raw):
        raise UnitError(f"{raw!a} is no UTF-8 text, or has a zero byte: use another name")
    try:
        return msgspec.convert(raw, kind, strict=not from_text, dec_hook=_parse)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UnitError):
            raise UnitError(str(error)) from None
        raise UnitError(f"{_shown(raw)} is not understood: {_expected(kind)}") from None


def _parse(kind: type, raw: Any) -> Any:
    assert issubclass(kind, _Value), f"no grammar for {kind}"
    return kind.parse(raw)


def _can_be_named(text: str) -> bool:
    """Whether text can be part of a status document, and of a path."""
    return "\0" not in text and text.encode(errors="ignore").decode() == text


def _shown(raw: object) -> str:
    """The offending value as the operator wrote it, or nearly."""
    if isinstance(raw, str):
        return repr(raw)
    try:
        return json.dumps(raw, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(raw)  # a date


def _expected(kind: Any) -> str:
    """What a key of a built-in type would take."""
    info = msgspec.inspect.type_info(kind)
    while isinstance(info, msgspec.inspect.UnionType):
        info = info.types[0]
    match info:
        case msgspec.inspect.BoolType():
            return "write true or false"
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"write a whole number, {low} to {high}"
        case msgspec.inspect.LiteralType(values=values):
            return f"write one of {', '.join(map(str, values))}"
        case _:
            return "write text in quotes"


def text_of(value: object) -> str:
    """A value as it is written after KEY= ."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
