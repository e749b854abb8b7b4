"""The trained artifact: written, read, inspected with, updated, published."""
