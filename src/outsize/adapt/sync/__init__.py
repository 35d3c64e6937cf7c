"""Which sums between ranks may be left out, or sent short: `outsize adapt sync`."""
