"""The identity service on Kubernetes: state in a Secret that all replicas follow and the leader changes, the bundle in every namespace."""
