"""The sidecar: decides about connections and requests in readable Python, and then moves their bytes untouched."""
