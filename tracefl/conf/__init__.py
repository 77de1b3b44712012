"""What Hydra composes: base.yaml, which `python -m tracefl.conf` writes, and groups of overrides."""
