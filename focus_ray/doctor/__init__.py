"""`focus-ray doctor`: checks whether this machine can run a configuration, and says what to do about each failed check."""
