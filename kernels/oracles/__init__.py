"""The oracles, a file per family of codecs: what every kernel must compute, bit for bit, in plain numpy."""
