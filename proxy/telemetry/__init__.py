"""What the sidecar tells about itself: counters, histograms, access log. Values only; core.runtime exports them. No clock inside."""
