"""Tasks of evaluate.py: run(config, dry_run) of a module writes one report."""
