"""The network of FYD: alignment, backbone, channel reduction and losses. It uses no Ray; only `backbones` reads files."""
