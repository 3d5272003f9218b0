"""What evaluate.py and the calibration line measure."""
