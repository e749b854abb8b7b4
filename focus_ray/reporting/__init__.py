"""Builds HTML pages about evaluations and trainings, and tables of metrics in Markdown. Does not use Ray."""
