"""What the verbs of the command line do, callable from Python too."""
