"""Networks, schedules and losses. Nothing in here imports anything of the project outside this package."""
