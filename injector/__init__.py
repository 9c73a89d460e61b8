"""Puts the sidecar into pods: decides whether, builds what is added, says it as a JSON patch."""
