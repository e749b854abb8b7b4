"""Runs work on Ray: joins a cluster, checks its resources, trains, evaluates, inspects and ingests on its workers."""
