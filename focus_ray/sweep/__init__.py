"""Settings searched over categories with Ray Tune."""
