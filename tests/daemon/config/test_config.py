"""Configuration: files, overrides, changes at run time, and every way to get it wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswapd import config
from vswapd.config import RELOADABLE, Config, ConfigError, load, reloadable
from vswapd.config_checks import MIN_DEVICE_BYTES
from vswapd.host import Host
from vswapd.settings import GroupLimits, Settings
from vswapd_blockdev.header import MIN_BYTES

HOST = Host(
    ram_bytes=8 << 30,
    uid=1000,
    uid_of={"alice": 1001, "john.doe": 1002}.get,
    gid_of={"staff": 50}.get,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "vswapd.toml"
        file.write_text(text)
        return file

    return write


def test_defaults_need_no_file() -> None:
    """Without file and overrides the engine gets a fifth of the memory and lz4."""
    assert load(None).settings(HOST) == Settings(
        pool_max=(8 << 30) // 5, pool_reserve=(8 << 30) // 20, dense="zstd:3"
    )


def test_file_then_overrides(write: Callable[[str], Path]) -> None:
    """A file's values hold until an override says something else."""
    file = write('[pool]\nmax = "1G"\ntiers = ["zstd:3"]\n[server]\nmax_connections = 7\n')
    found = load(file, ["pool.max=2G", "pool.enabled=false", "server.max_batch=128"])
    settings = found.settings(HOST)
    assert (settings.pool_max, settings.codec, settings.pool_enabled) == (2 << 30, "zstd:3", False)
    assert (found.server.max_connections, found.server.max_batch) == (7, 128)


def test_devices_of_file_and_overrides_add_up(write: Callable[[str], Path]) -> None:
    """Each [[device]] and each `--set device=` is one device, in this order."""
    file = write('[[device]]\npath = "/a"\nsize = "1G"\nencrypt = false\n')
    found = load(file, ["device=/b,size=512M,priority=5", "device=/c"]).devices
    assert [(d.path, d.size, d.priority, d.encrypt) for d in found] == [
        ("/a", 1 << 30, 0, False),
        ("/b", 512 << 20, 5, True),
        ("/c", None, 0, True),
    ]


def test_groups_take_what_they_leave_out_from_default(write: Callable[[str], Path]) -> None:
    """A user's group is found by uid, and keys it does not set are those of groups.default."""
    file = write(
        '[groups.default]\npool_max = "25%"\n[groups.alice]\nwriteback = false\n'
        '[groups."john.doe"]\npool_max = "none"\ndevice_max = "0"\n[groups.5]\npool_max = 0\n'
    )
    settings = load(file, ["pool.max=1G", "groups.john.doe.writeback=false"]).settings(HOST)
    quarter = (1 << 30) // 4
    assert settings.default_group == GroupLimits(pool_max=quarter)
    assert dict(settings.groups) == {
        "1001": GroupLimits(pool_max=quarter, writeback=False),
        "1002": GroupLimits(device_max=0, writeback=False),
        "5": GroupLimits(pool_max=0),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool = 5", "pool: is a table: write [pool]"),
        ("max = 5", "max: there is no such key; did you mean pool.max?"),
        ("[pol]\nx = 1", "pol: there is no such key; did you mean pool?"),
        ('[pool]\nmaks = "1G"', "pool.maks: there is no such key; did you mean pool.max?"),
        ("[shrinker]\nhigh_watermrak = 1", "did you mean shrinker.high_watermark?"),
        (
            '[server]\ntiers = ["lz4"]',
            "server.tiers: there is no such key; did you mean pool.tiers?",
        ),
        ("[pool]\nqqqqq = 1", "pool.qqqqq: there is no such key; known here: pool.max, "),
        ("[pool]\nmax = true", "pool.max: true is not understood: write 512M"),
        ("[pool]\nmax = 0.5", "pool.max: 0.5 is not understood: write 512M"),
        ('[pool]\nmax = "12Q"', "pool.max: '12Q' has a unit that sizes do not have: write 512M"),
        ('[pool]\nmax = "120%"', "pool.max: '120%' is more than the whole: write 0% to 100%"),
        ('[pool]\nmax = "100K"', "pool.max: 102400 bytes is too little: write 0 or at least 1M"),
        ('[pool]\ntiers = ["snappy"]', "pool.tiers: 'snappy' is no codec: use lz4, lz4hc:1 to"),
        ("[pool]\ntiers = []", "pool.tiers: []: write one codec or two"),
        ('[pool]\ntiers = ["lz4", "zstd:1", "zstd:3"]', "write one codec or two"),
        ('[pool]\ntiers = ["lz4", "lz4"]', "the second codec is for pages that got old"),
        ("[pool]\ntiers = 3", "pool.tiers: 3: write one codec or two"),
        ("[pool]\ntiers = [3]", "3 is no codec"),
        ('[pool]\ntiers = ["zstd"]', "is no codec: use"),
        ('[pool]\ntiers = ["zstd:23"]', "levels of zstd are 1 to 22"),
        ('[pool]\ntiers = ["zstd:03"]', "is no codec: use"),
        ('[pool]\ntiers = ["lz4hc:13"]', "levels of lz4hc are 1 to 12"),
        ('[pool]\nverify = "often"', "pool.verify: 'often' is not understood: write one of"),
        ('[pool]\nenabled = "true"', "pool.enabled: 'true' is not understood: write true or false"),
        ("[server]\nmax_batch = 0", "server.max_batch: 0 is not understood: write a whole"),
        ("[server]\nmax_batch = 4097", "write a whole number, 1 to 4096"),
        ('[server]\nmax_batch = "5"', "write a whole number, 1 to 4096"),
        ("[server]\nmax_batch = true", "write a whole number, 1 to 4096"),
        ("[server]\nsocket = 5", "server.socket: 5 is not understood: write text in quotes"),
        ('[server]\nsocket = "x.sock"', "server.socket: 'x.sock' is no absolute path"),
        (f'[server]\nsocket = "/{"x" * 107}"', "keep it to 107"),
        ('[server]\nsocket_mode = "rw"', "server.socket_mode: 'rw' is no file mode: write octal"),
        ("[server]\nsocket_mode = 600", "is no file mode: write octal"),
        ('[server]\nbuffer_memory = "1M"', "write at least 33M, or lower server.max_batch"),
        ('[server]\nrequest_timeout = "30"', "'30' has no unit: write 30s"),
        ('[server]\nrequest_timeout = "5M/s"', "has a unit that durations do not have: write 30s"),
        ('[server]\nrequest_timeout = "0s"', "server.request_timeout: 0s is too short"),
        (
            '[shrinker]\nlow_watermark = "95%"',
            "must be below shrinker.high_watermark, which is 95%",
        ),
        ('[pool]\naccept_threshold = "80%"', "85% must not be above pool.accept_threshold"),
        ('[shrinker]\nlow_watermark = "0%"\n[pool]\naccept_threshold = "0%"', "0% would refuse"),
        (
            "[shrinker]\nhigh_watermark = 0.9",
            "shrinker.high_watermark: 0.9 is not understood: write",
        ),
        ('[shrinker]\nrate = "5M/h"', "shrinker.rate: '5M/h' is no rate"),
        ("device = 5", "device: devices are written as [[device]]"),
        ('[device]\npath = "/a"', "device: devices are written as [[device]]"),
        ("[[device]]\nsize = 5", "device[0].path: a device needs a path"),
        ('[[device]]\npath = "a"', "device[0].path: 'a' is no absolute path"),
        ('[[device]]\npath = "/a"\npriority = -1', "device[0].priority: -1 is not understood"),
        (
            '[[device]]\npath = "/a"\nsiez = 1',
            "device[0].siez: there is no such key; did you mean device[0].size?",
        ),
        (
            '[[device]]\npath = "/a"\nsize = "64K"',
            "device[0].size: 64K is too small: write at least 1280K",
        ),
        ('[[device]]\npath = "/a"\n[[device]]\npath = "/a"', "device[1].path: /a is there twice"),
        (
            "[groups]\npool_max = 1",
            "groups.pool_max: limits are of a group: write [groups.default]",
        ),
        (
            "[groups.a]\npool_mx = 1",
            "groups.a.pool_mx: there is no such key; did you mean groups.a.pool_max?",
        ),
        ('[groups.a]\npool_max = "nine"', "'nine' is no size: write 512M"),
        ('[groups.a]\ndevice_max = "5%"', "'5%' has a unit that sizes do not have"),
        ('[metrics]\nlisten = "9177"', "metrics.listen: '9177' is no address and port"),
        ('[metrics]\nlisten = "example.org:80"', "is no address and port"),
        ('[metrics]\nlisten = "127.0.0.1:0"', "is no address and port"),
        ('[metrics]\nlisten = "::1:80"', "write 127.0.0.1:9177 or [::1]:9177"),
        ('[metrics]\ntextfile = "/a/b.txt"', "ends in .prom"),
        ('[log]\nlevel = "loud"', "log.level: 'loud' is not understood: write one of"),
    ],
)
def test_wrong_file_is_refused_in_one_line(
    write: Callable[[str], Path], text: str, message: str
) -> None:
    """Every mistake in a file is one line with the file, the dotted key and what to write."""
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pool.max", "--set pool.max: write it as KEY=VALUE"),
        (
            "pool.maks=1G",
            "--set pool.maks=1G: pool.maks: there is no such key; did you mean pool.max?",
        ),
        ("pool.enabled=perhaps", "pool.enabled: 'perhaps' is not understood: write true or false"),
        ("server.max_batch=many", "write a whole number, 1 to 4096"),
        ("device=", "device.path: a device needs a path"),
        ("device=/a,5M", "'5M' is no option: write device=PATH[,size=512M]"),
        ("device=/a,size=1G,size=2G", "device.size: size is given twice: which is meant?"),
        ("device=/a, size=1G , size = 1G", "device.size: size is given twice"),
        ("device=/a,path=/b", "device.path: path is given twice"),
        ("device=/a,encrypt=true,priority=1,encrypt=true", "encrypt is given twice"),
        ("device=/a,siez=5M", "device.siez: there is no such key; did you mean device.size?"),
        ("device=/a,size=1K", "--set device=/a,size=1K: device[0].size: 1K is too small"),
        ("device.path=/a", "device.path: there is no such key"),
        (
            "groups.pool_max=5",
            "groups.pool_max: there is no such key; did you mean groups.default.pool_max",
        ),
        (
            "shrinker.low_watermark=99%",
            "--set shrinker.low_watermark=99%: shrinker.low_watermark: 99% must",
        ),
        ("=5", "there is no such key"),
        ("pool=5", "pool: is a table: name a key of it, such as pool.max"),
        ("groups=5", "groups: is a table: name a key of it, such as groups.default.pool_max"),
    ],
)
def test_wrong_override_is_refused_in_one_line(override: str, message: str) -> None:
    """Every mistake in --set is one line that begins with the override itself."""
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert message in str(caught.value)
    assert str(caught.value).startswith("--set ")


def test_smallest_device_is_the_device_s_own_word() -> None:
    """What the configuration calls the smallest size is what can be put into use."""
    assert MIN_DEVICE_BYTES == MIN_BYTES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[pool\n", "is not valid TOML: "),
        (b"\xff\xfe", "is not UTF-8 text"),
        (None, "cannot be read: "),
    ],
)
def test_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A file that cannot be read or parsed is an error with its path."""
    file = tmp_path / "x.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_change_at_run_time_is_checked_against_the_rest() -> None:
    """with_override makes a new valid configuration or none, and leaves the old one alone."""
    old = load(None)
    new = old.with_override("pool.max", "64M")
    assert (old.get("pool.max"), new.get("pool.max")) == ("20%", "64M")
    with pytest.raises(ConfigError, match=r"^shrinker\.low_watermark: 96% must be below"):
        new.with_override("shrinker.low_watermark", "96%")
    with pytest.raises(ConfigError, match=r"^device: .*vswapctl swapon"):
        new.with_override("device", "/a")
    with pytest.raises(ConfigError, match=r"^pool\.maks: .*did you mean pool\.max"):
        new.with_override("pool.maks", "1")
    with pytest.raises(ConfigError, match=r"^pool\.maks: .*did you mean pool\.max"):
        new.get("pool.maks")


def test_flat_can_be_read_back() -> None:
    """Every value of flat() is text that --set takes, and gives the same configuration."""
    made = load(
        None,
        [
            "device=/a,size=1G",
            "groups.alice.pool_max=5%",
            "shrinker.rate=3M",
            "server.socket_mode=660",
            "shrinker.idle_age=90s",
            "pool.tiers=zstd:9,zstd:19",
            "pool.max=1.5G",
        ],
    )
    flat = made.flat()
    assert flat["device[0].path"] == "/a"
    assert flat["groups.alice.pool_max"] == "5%"
    assert flat["server.socket_mode"] == "0660"
    again = load(None, [f"{k}={v}" for k, v in flat.items() if not k.startswith("device")])
    assert {k: v for k, v in flat.items() if not k.startswith("device")} == again.flat()


def test_reload_keeps_what_cannot_change_and_names_it() -> None:
    """A reload takes over live keys; fixed ones stay as they were and are listed."""
    old = load(None, ["device=/a,size=1G"])
    new = load(
        None,
        ["pool.max=64M", "pool.lock_memory=true", "server.max_batch=8", "groups.5.pool_max=1M"],
    )
    kept = old.reloaded(new)
    assert old.fixed_changes(new) == (
        "device[0].encrypt",
        "device[0].path",
        "device[0].priority",
        "device[0].size",
        "pool.lock_memory",
        "server.max_batch",
    )
    assert kept.fixed_changes(old) == ()
    assert (kept.get("pool.max"), kept.get("groups.5.pool_max")) == ("64M", "1M")
    assert kept.devices == old.devices


def test_live_keys_are_all_but_those_of_the_start() -> None:
    """Whatever is not about the socket, the table's size, locked memory or devices is live."""
    fixed = {k for k in config.KEYS if k not in RELOADABLE}
    assert {k.partition(".")[0] for k in fixed} == {"server", "table", "pool"}
    assert {k for k in fixed if k.startswith("pool.")} == {"pool.lock_memory"}
    assert reloadable("groups.john.doe.writeback")
    assert not reloadable("device[0].path")
    assert not reloadable("groups.alice.nonsense")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pool.max=9G"], "pool.max: 9G is more than the 8.00 GiB of memory"),
        (["groups.bob.writeback=false"], "groups.bob: this host has no user of that name"),
        (["server.socket_group=crew"], "server.socket_group: this host has no group 'crew'"),
        (["groups.alice.writeback=false", "groups.1001.writeback=true"], "uid 1001 has two tables"),
    ],
)
def test_what_the_host_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    """More memory than there is, unknown users and groups, and users named twice, are errors."""
    with pytest.raises(ConfigError, match=message):
        load(None, overrides).settings(HOST)


def test_configured_socket_goes_before_the_default() -> None:
    """server.socket is where to listen; without it, the host's default is."""
    assert load(None).socket_path(HOST) == "/tmp/vswapd-1000/vswapd.sock"
    assert load(None, ["server.socket=/x"]).socket_path(HOST) == "/x"


_SHARES = st.integers(0, 100).map(lambda percent: f"{percent}%")


@given(low=_SHARES, high=_SHARES, accept=_SHARES)
def test_configuration_that_exists_is_valid(low: str, high: str, accept: str) -> None:
    """Any three shares either make a configuration whose watermarks fit, or none."""
    texts = [f"shrinker.low_watermark={low}", f"shrinker.high_watermark={high}"]
    try:
        settings = load(None, [*texts, f"pool.accept_threshold={accept}"]).settings(HOST)
    except ConfigError:
        return
    assert settings.low_watermark < settings.high_watermark
    assert settings.accept_threshold > 0
    assert settings.low_watermark <= settings.accept_threshold


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_a_configuration_or_one_error(key: str, value: str) -> None:
    """No override at all ends in anything but a Config or a ConfigError."""
    with contextlib.suppress(ConfigError):
        assert isinstance(load(None, [f"{key}={value}"]), Config)


@given(st.sampled_from(config.KEYS), st.text(max_size=12))
def test_any_value_is_a_configuration_or_one_error(key: str, value: str) -> None:
    """No value of a known key ends in anything but a Config or a ConfigError."""
    try:
        found = load(None, [f"{key}={value}"])
    except ConfigError:
        return
    assert load(None, [f"{key}={found.get(key)}"]).get(key) == found.get(key)
