"""Made-up parts with made-up defects."""
