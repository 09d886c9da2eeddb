"""Hand pages to vswapd over a Unix socket and get slots back."""
