"""The command line: one file a command, loaded when it is called. It parses, calls and prints."""
