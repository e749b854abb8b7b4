"""Whether this machine can do what is asked of it: checks, each with what to do where it fails."""
