"""`pillion demo`: the shop of examples/ on this machine, and every promise about it as a line that can fail."""
