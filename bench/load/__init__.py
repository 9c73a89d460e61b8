"""Load generators and sinks of the benchmark; each is a program of its own, run in the client's or server's namespace."""
