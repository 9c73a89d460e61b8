"""From the chart in manifests/helm and settings to Kubernetes objects, without Helm: what `pillion install` prints."""
