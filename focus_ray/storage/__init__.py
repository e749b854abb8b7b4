"""Files on a disk or on S3."""
