"""What runs tell to experiment trackers: said once, handed to each."""
