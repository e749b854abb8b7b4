"""Package that fits a detector to normal images, in one process or in a torch.distributed group. It does not use Ray."""
