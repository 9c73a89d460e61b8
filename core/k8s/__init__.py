"""Kubernetes objects as this project reads them (typed views) and where they come from: a folder of manifests, or the API server."""
