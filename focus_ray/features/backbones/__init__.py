"""Package of the backbones: pretrained networks that compute the features of images."""
