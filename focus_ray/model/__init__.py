"""The network: alignment, backbone, reduction, losses. No files, no Ray."""
