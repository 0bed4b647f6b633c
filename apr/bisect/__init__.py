"""Which op of which layer is wrong: two sides run in lockstep, compared op by op."""
