"""Training of categories, in one process or with Ray Train."""
