"""Records trainings, evaluations and sweeps in experiment trackers (MLflow, TensorBoard, Weights & Biases)."""
