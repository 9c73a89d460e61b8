"""Capture of a pod's TCP and acceleration of its loopback hop: programs, their loader, and the node's agent."""
