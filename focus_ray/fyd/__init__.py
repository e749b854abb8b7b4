"""Package of the FYD training (arXiv 2110.04538) of the network: losses, objective, optimiser and the loop over an interval."""
