"""What Hydra composes: base.yaml, which docs/write_settings.py writes, and groups of overrides."""
