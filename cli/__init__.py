"""The `pillion` command: looks at a running mesh and at manifests, and runs the mesh on one machine."""
