"""A made-up plant on this machine: an S3 server, several Ray nodes, thousands of small images in many categories."""
