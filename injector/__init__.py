"""Puts the sidecar into pods: decides whether, builds what is added, returns it as a JSON patch."""
