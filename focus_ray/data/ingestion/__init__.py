"""Ingestion: checks the source files, removes duplicates, writes part files in chunks, and changes categories later."""
