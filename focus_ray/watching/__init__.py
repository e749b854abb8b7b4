"""Inspects what arrives in a folder, for days: each image once, whatever is killed, rewritten, unmounted or full meanwhile."""
