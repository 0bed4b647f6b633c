"""Find the op and the layer that are wrong: two sides run in lockstep and are compared op by op."""
