"""The mesh on one machine: pods as network namespaces, processes instead of images, no Kubernetes."""
