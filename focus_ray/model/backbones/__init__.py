"""ImageNet backbones: one file a family, and the list of them."""
