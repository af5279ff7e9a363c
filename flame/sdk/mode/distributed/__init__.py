"""Learning among equals: no server, the members of one channel agree and average by themselves."""
