"""Tables from run directories; what the command line, experiments and notebooks call."""
