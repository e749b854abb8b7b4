"""Image alignment: geometric transforms, and the aligners that estimate them."""
