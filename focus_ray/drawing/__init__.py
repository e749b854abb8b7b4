"""Heat maps, overlays and plots."""
