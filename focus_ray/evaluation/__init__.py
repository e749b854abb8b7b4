"""How good scores are and what they mean: metrics, calibration, synthetic defects, reports."""
