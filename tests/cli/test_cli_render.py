"""The chart without Helm: the template language, the settings, and what the chart renders to."""
