"""Networks, schedules and losses. This package imports nothing else of the project."""
