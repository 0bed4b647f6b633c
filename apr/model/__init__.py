"""The mathematics: configuration, parameters, forward, backward, optimizer, cost."""
