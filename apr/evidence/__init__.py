"""A run that proves itself: gates, measurements, the judge, the seal."""
