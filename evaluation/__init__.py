"""Tasks of evaluate.py, one module per task. The module's run(config, dry_run) writes the report of the task."""
