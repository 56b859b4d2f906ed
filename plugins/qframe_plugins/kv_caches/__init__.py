"""KV-cache quantizers: how keys and values are stored."""
