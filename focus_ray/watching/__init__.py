"""Watches a folder for days and inspects each new image once, even if files change, disks fill up or processes are killed."""
