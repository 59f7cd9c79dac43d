"""The commands, a module each; `table` lists them in the order of the help."""
