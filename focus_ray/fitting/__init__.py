"""From normal images to a fitted detector, alone or in a torch.distributed group. No files, no Ray."""
