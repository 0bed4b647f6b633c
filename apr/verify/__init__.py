"""Evidence of a run checked again from outside."""
