"""Package for inference: detector, anomaly maps, thresholds and p-values, and tests for a shift of the scores."""
