"""What Hydra composes: base.yaml, written from config.py by `python -m tracefl.conf`, and groups of overrides."""
