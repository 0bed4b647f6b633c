"""The `apr` command: one thin module per sub-command, imported only when it is asked for."""
