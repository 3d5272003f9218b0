"""What evaluate.py measures."""
