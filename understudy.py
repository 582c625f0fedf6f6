"""The command line: dispatches, and imports each command's package only when it is used."""
