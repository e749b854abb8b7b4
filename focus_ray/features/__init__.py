"""Pretrained backbones, alignment of images and features, and channel reduction."""
