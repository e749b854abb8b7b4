"""The whole scorer of a bundle as one file for other runtimes: made, checked against PyTorch, described."""
