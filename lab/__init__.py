"""The machinery around the science: command line, settings, files, runs, logs, batches, processes, pictures."""
