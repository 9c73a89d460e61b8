"""The small runtime that every component stands on: latest-value cells, TLS over memory BIOs, supervision, admin port, logs."""
