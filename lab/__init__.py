"""What any training project needs, and says nothing of diffusion: command line, settings, files, runs, logs, batches, processes, pictures."""
