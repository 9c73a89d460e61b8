"""How large a cluster one policy controller carries: row P10. ``python -m bench.scale``."""
