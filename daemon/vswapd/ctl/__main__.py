"""`python -m vswapd.ctl` is vswapctl."""

import sys

from vswapd.ctl.command import main

if __name__ == "__main__":
    sys.exit(main())
