"""The FYD training: losses, objective, optimiser and the loop over one epoch."""
