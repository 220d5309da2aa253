"""The virtual cluster, the peers beside hybridcomm, and the studies behind the README's figures."""
