"""ImageNet backbones: one file a family."""
