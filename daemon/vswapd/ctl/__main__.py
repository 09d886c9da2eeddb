"""`python -m vswapd.ctl` is vswapctl."""

from typing import NoReturn

from vswapd import entry


def main() -> NoReturn:
    """Run the command; ends the process."""
    entry.run("vswapctl", "vswapd.ctl.command")


if __name__ == "__main__":
    main()
