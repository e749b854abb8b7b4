"""Fits a detector to normal images, in one process or in a torch.distributed group. It uses no files and no Ray."""
