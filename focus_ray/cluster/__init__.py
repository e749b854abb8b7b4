"""Work on Ray: joins a cluster, checks its resources and its storage, and hands out pieces of work to workers."""
