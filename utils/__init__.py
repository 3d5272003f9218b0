"""Shared infrastructure: command line, settings, errors, files, checkpoints, devices, processes, images."""
