"""The command line: every command is parsed here, calls a function of another room, and prints what that gives."""
