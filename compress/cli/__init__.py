"""The command line: arguments in, progress and exit codes out."""
