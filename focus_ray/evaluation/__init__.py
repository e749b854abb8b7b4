"""Measures how good scores are (metrics, reports) and what a score means (calibration). Makes synthetic defects."""
