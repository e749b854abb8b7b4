"""Package of the kinds of densities, one module for each. A kind owns its settings, its stored state and its export."""
