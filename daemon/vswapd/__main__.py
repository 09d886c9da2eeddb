"""`python -m vswapd`, and what the command `vswapd` runs."""

from typing import NoReturn

from vswapd import held_signals

# Before anything that takes time is loaded: see the module.
held_signals.hold()


def main() -> NoReturn:
    """Run the command; ends the process."""
    from vswapd import entry

    entry.run("vswapd", "vswapd.cli")


if __name__ == "__main__":
    main()
