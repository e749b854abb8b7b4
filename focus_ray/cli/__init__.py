"""The `focus-ray` command: one file a group of subcommands."""
