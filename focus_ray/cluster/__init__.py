"""What runs on Ray: joining a cluster, preflight, training, batch inspection."""
