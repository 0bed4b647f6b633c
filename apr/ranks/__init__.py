"""Compute with several processes, the ranks: who they are, how bytes get from one to another, and what one of them owns."""
