"""The kinds of densities, one file for each. A kind owns its settings, its stored state and its export."""
