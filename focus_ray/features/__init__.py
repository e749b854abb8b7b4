"""Package of the network that computes features: pretrained backbones, and alignment of images and features."""
