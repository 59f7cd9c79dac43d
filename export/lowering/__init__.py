"""The table of what each target gets, and the nodes of one norm."""
