"""Images and data sets: what they are, how they are read, split and shared out. No Ray."""
